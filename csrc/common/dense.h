// Sigma as a matrix, for images so small that a matrix product beats two transforms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <utility>

namespace robustkern {

using torch::stable::Tensor;

// The largest C * H * W for which the matrix is made. Measured with 16 to 256 samples: where either
// way takes as long. The form by transforms saves the way back, so its matrix pays for less.
constexpr int64_t kDenseProduct = 300, kDenseForm = 160;

inline int64_t sample_elements(const Tensor& images) {
  return images.size(1) * images.size(2) * images.size(3);
}

// Sigma g as (N, C * H * W), in the common dtype T of both contiguous arguments.
template <class T>
Tensor dense_product(const Tensor& gradient, const Tensor& covariance) {
  const int64_t channels = gradient.size(1), height = gradient.size(2), width = gradient.size(3);
  const int64_t pixels = height * width, size = sample_elements(gradient);
  Tensor matrix = torch::stable::new_empty(covariance, {size, size});
  const T* from = static_cast<const T*>(covariance.const_data_ptr());
  T* to = static_cast<T*>(matrix.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t y = height - 1 - i / width, x = width - 1 - i % width;
      for (int64_t k = 0; k < channels; ++k) {
        const T* displaced =
            from + ((c * channels + k) * (2 * height - 1) + y) * (2 * width - 1) + x;
        for (int64_t j = 0; j < height; ++j, to += width, displaced += 2 * width - 1) {
          std::memcpy(to, displaced, width * sizeof(T));
        }
      }
    }
  }
  return torch::stable::matmul(torch::stable::view(gradient, {gradient.size(0), size}),
                               torch::stable::transpose(matrix, 0, 1));
}

}  // namespace robustkern
