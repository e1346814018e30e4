// Which multiplies: the register tiles of this core, or the BLAS of the framework above it. A choice per class of shapes, as a set
// of bits; who measured it and where it is stored is not known here. No torch in here.
#pragma once
#include <cstdint>
#include <string>

#include "core.h"

namespace mmc {

enum class Number : int { float32 = 0, bfloat16 = 1 };  // float16 is multiplied in float32
constexpr int kNumbers = 2;

// How the operands lie: x wᵀ (both along k), d w (the second across k), dᵀ x (both across k).
enum class Order : int { forward = 0, input_gradient = 1, weight_gradient = 2 };

// One class of products [m, k] [k, n]: order, then which side is below 16 (none, m, n, k), then 2 m n k below 2^18, 2^22, 2^26.
constexpr int kProductClasses = 3 * 4 * 4;
MMC_API int product_class(Order order, int64_t m, int64_t n, int64_t k);

// Bit c: products of class c go through the BLAS.
using Ways = uint64_t;

// Where nothing is measured or nothing may depend on a measurement: tiles in float32; in bfloat16 the BLAS for products of 2^22
// and more where the processor multiplies bfloat16.
MMC_API Ways fixed_ways(Number number);

// The ways of products of `number` on `threads` threads: the pinned one; else the fixed ones where `fixed`; else the measured ones,
// for which the source is asked once.
MMC_API Ways ways(Number number, int threads, bool fixed);

MMC_API void set_ways(Number number, int threads, Ways measured);
MMC_API void forget_ways();
MMC_API bool has_ways(Number number, int threads);
// "tiles", "blas", or "auto"; an empty return value means success, anything else is one line that says what was wrong.
MMC_API std::string pin_ways(const std::string& name);
MMC_API const char* pinned_ways();

// The source measures, or reads what was measured, and calls set_ways; it must not throw. May be null.
MMC_API void set_ways_source(void (*source)(Number number, int threads));

// Seconds of one product by a way, the best of a few samples; given by the library above that has both. May be null.
using ProductTimer = double (*)(Number number, Order order, int64_t m, int64_t n, int64_t k, bool blas);
MMC_API void set_product_timer(ProductTimer timer);
MMC_API ProductTimer product_timer();

}  // namespace mmc
