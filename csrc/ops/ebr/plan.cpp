#include "plan.h"

namespace mmc::ebr {
namespace {

template <class Keep>
RowList list_rows(int64_t batch, const Keep& keep) {
  RowList rows;
  rows.samples.reserve(batch);
  for (int64_t b = 0; b < batch; ++b)
    if (keep(b)) rows.samples.push_back(static_cast<int32_t>(b));
  rows.count = static_cast<int64_t>(rows.samples.size());
  rows.all = rows.count == batch;
  if (rows.all) rows.samples.clear();
  return rows;
}

RowList all_rows(int64_t batch) {
  RowList rows;
  rows.count = batch;
  return rows;
}

}  // namespace

bool Plan::has_source(int64_t b, int64_t i) const {
  if (own()) return is_present(b, i);
  if (index) {
    const int64_t j = index(b, i);
    return j >= 0 && is_present(b, j);
  }
  for (int64_t j = 0; j < m; ++j)
    if (weight(b, i, j) != 0 && is_present(b, j)) return true;
  return false;
}

Plan::Plan(int64_t m_, int64_t batch_, Table<bool> present_, Table<int64_t> index_, const float* weights_)
    : m(m_), batch(batch_), present(present_), index(index_), weights(weights_), offset(m_ + 1, 0) {
  if (index) {
    int64_t low = index.data && batch * m > 0 ? index(0, 0) : 0, high = low;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t j = index(b, i);
        if (j < low) low = j;
        if (j > high) high = j;
      }
    if (low < -1 || high >= m) {
      error = "ebr_step: source has values from " + std::to_string(low) + " to " + std::to_string(high) + "; with " +
              std::to_string(m) + " modalities allowed are -1 (none) to " + std::to_string(m - 1);
      return;
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    encoded.push_back(present ? list_rows(batch, [&](int64_t b) { return present(b, i); }) : all_rows(batch));
    offset[i + 1] = offset[i] + encoded[i].count;
  }
  for (int64_t i = 0; i < m; ++i)
    decoded.push_back(own() ? encoded[i] : list_rows(batch, [&](int64_t b) { return has_source(b, i); }));
  for (int64_t i = 0; i < m; ++i) {
    if (own() || encoded[i].all) {
      loss_rows += decoded[i].count;
    } else {
      for (int64_t r = 0; r < decoded[i].count; ++r) loss_rows += present(decoded[i][r], i);
    }
  }
  if (!own() && rows() < m * batch) {
    place.assign(m * batch, -1);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t r = 0; r < encoded[i].count; ++r)
        place[i * batch + encoded[i][r]] = static_cast<int32_t>(offset[i] + r);
  }
}

}  // namespace mmc::ebr
