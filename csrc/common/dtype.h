// The dtypes of the ops, and what their arithmetic shares.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace robustkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What elements are computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls body with a factor for elements in their Wide type, or in double where it is too large: a
// zero times infinity must not become NaN.
template <class T, class Body>
void with_factor(double factor, Body body) {
  if (std::abs(factor) <= std::numeric_limits<Wide<T>>::max()) {
    body(static_cast<Wide<T>>(factor));
  } else {
    body(factor);
  }
}

// value * sign(g)
template <class W>
C10_HOST_DEVICE W times_sign(W value, W g) {
  return g > 0 ? value : g < 0 ? -value : W(0);
}

// Calls body with a zero of the tensor's dtype: `dispatch(x, [&](auto zero) { using T = ...`.
template <class Body>
void dispatch(const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline void check_batches(const char* op, const Tensor& a, const Tensor& b) {
  const auto a_sizes = a.sizes(), b_sizes = b.sizes();
  STD_TORCH_CHECK(a.dim() >= 1 && a.scalar_type() == b.scalar_type() &&
                      a.get_device_index() == b.get_device_index() &&
                      std::equal(a_sizes.begin(), a_sizes.end(), b_sizes.begin(), b_sizes.end()),
                  op, ": expected tensors (N, ...) of one shape, dtype and device");
}

}  // namespace robustkern
