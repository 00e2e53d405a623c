// Images (N, C, H, W) and covariances (C, C, 2H-1, 2W-1), as kernels that compute in one dtype see
// them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"
#include "common/per_sample.h"

namespace robustkern {

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(
      tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// Calls body with a zero of the dtype in which the tensor's elements are summed.
template <class Body>
void dispatch_sums(const Tensor& tensor, Body body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  body(float{});
}

inline void check_images(const char* op, const Tensor& images) {
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) && images.size(2) && images.size(3), op,
                  ": expected images (N, C, H, W)");
}

inline void check_covariance(const char* op, const Tensor& gradient, const Tensor& covariance) {
  check_images(op, gradient);
  bool fits = covariance.dim() == 4;
  for (int64_t d = 0; fits && d < 4; ++d) {
    const int64_t size = covariance.size(d);
    fits = d < 2 ? size == gradient.size(1) : size % 2 == 1 && size < 2 * gradient.size(d);
  }
  STD_TORCH_CHECK(fits, op, ": expected a covariance (C, C, 2P-1, 2Q-1) with P <= H and Q <= W");
}

// The covariance at all displacements, (C, C, 2H-1, 2W-1): zero where it was not given.
inline Tensor at_all_displacements(const Tensor& covariance, const Tensor& gradient) {
  const int64_t y = gradient.size(2) - 1 - covariance.size(2) / 2;
  const int64_t x = gradient.size(3) - 1 - covariance.size(3) / 2;
  return y || x ? torch::stable::pad(covariance, {x, x, y, y}) : covariance;
}

}  // namespace robustkern
