// Tensors (N,): one value per sample, float64 for float64 samples and float32 for all others.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace robustkern {

inline ScalarType per_sample_dtype(const Tensor& samples) {
  return samples.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor to_per_sample_tensor(const std::vector<double>& values, const Tensor& samples) {
  const int64_t count = static_cast<int64_t>(values.size());
  Tensor tensor = torch::stable::new_empty(samples, {&count, 1}, per_sample_dtype(samples));
  dispatch(tensor, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<T>(values[i]);
  });
  return tensor;
}

inline void check_per_sample(const char* op, const Tensor& tensor, const Tensor& samples) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == samples.size(0) &&
                      tensor.scalar_type() == per_sample_dtype(samples) &&
                      tensor.get_device_index() == samples.get_device_index(),
                  op, ": expected one value per sample, in the dtype that accumulates");
}

inline std::vector<double> from_per_sample_tensor(const char* op, const Tensor& tensor,
                                                  const Tensor& samples) {
  check_per_sample(op, tensor, samples);
  std::vector<double> values(tensor.size(0));
  dispatch(tensor, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(tensor.const_data_ptr());
    const int64_t stride = tensor.stride(0);
    for (size_t i = 0; i < values.size(); ++i) values[i] = data[i * stride];
  });
  return values;
}

}  // namespace robustkern
