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
  STD_TORCH_CHECK(covariance.dim() == 4 && covariance.size(0) == gradient.size(1) &&
                      covariance.size(1) == gradient.size(1) &&
                      covariance.size(2) == 2 * gradient.size(2) - 1 &&
                      covariance.size(3) == 2 * gradient.size(3) - 1,
                  op, ": expected a covariance (C, C, 2H-1, 2W-1)");
}

}  // namespace robustkern
