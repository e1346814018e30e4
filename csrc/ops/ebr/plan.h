// Which rows of an EBR step are computed: the present ones, compactly, and the targets that have a source. No torch in here.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mmc::ebr {

// A bool or integer table [B, m] with any strides.
template <class T>
struct Table {
  const T* data = nullptr;
  int64_t row = 0, col = 0;
  explicit operator bool() const { return data != nullptr; }
  T operator()(int64_t b, int64_t i) const { return data[b * row + i * col]; }
};

// Ascending sample numbers; an empty list with all = true stands for every sample.
struct RowList {
  bool all = true;
  int64_t count = 0;
  std::vector<int32_t> samples;
  int64_t operator[](int64_t r) const { return all ? r : samples[r]; }
};

struct Plan {
  int64_t m = 0, batch = 0;
  Table<bool> present;
  Table<int64_t> index;           // integer source, or null
  const float* weights = nullptr;  // weighted source [B, m, m], or null

  std::vector<RowList> encoded;  // rows of modality i that are present
  std::vector<RowList> decoded;  // rows of target i that have a present source
  std::vector<int64_t> offset;   // first compact row of modality i, latents stored one modality after the other; [m] = all
  std::vector<int32_t> place;    // compact row of (i, b) at i * B + b, -1 where absent; only with a source and absent rows
  int64_t loss_rows = 0;         // present and with a source
  std::string error;             // one line where the source is out of range

  Plan(int64_t m, int64_t batch, Table<bool> present, Table<int64_t> index, const float* weights);

  bool own() const { return !index && !weights; }
  bool is_present(int64_t b, int64_t i) const { return !present || present(b, i); }
  float weight(int64_t b, int64_t i, int64_t j) const { return weights[(b * m + i) * m + j]; }
  int64_t rows() const { return offset[m]; }
  // compact row of latent j of sample b, which is present
  int64_t latent(int64_t j, int64_t b) const { return place.empty() ? j * batch + b : place[j * batch + b]; }
  bool has_source(int64_t b, int64_t i) const;
};

}  // namespace mmc::ebr
