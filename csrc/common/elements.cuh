// The elements of one tensor (N, *D) of any strides, as a kernel reads them: in packs of 16 bytes
// where they lie so, else one by one.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/flatten.h"

namespace robustkern {

constexpr int kPackBytes = 16;  // the most that a thread loads at once

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

template <class T>
struct Elements {
  static constexpr int kMaxLoops = 8;

  const T* data;
  int64_t sample_stride;
  int loops;  // at least one
  Loop loop[kMaxLoops];

  // Where element `index` of a sample lies. Indices that have to be divided fit 32 bits: a division
  // in 64 bits is a function call, for which a kernel would need a stack.
  __device__ int64_t offset(int64_t index) const {
    if (loops == 1) return index * loop[0].stride;
    int64_t offset = 0;
    auto rest = static_cast<uint32_t>(index);
    for (int d = loops - 1; d > 0; --d) {
      const auto size = static_cast<uint32_t>(loop[d].size);
      offset += static_cast<int64_t>(rest % size) * loop[d].stride;
      rest /= size;
    }
    return offset + static_cast<int64_t>(rest) * loop[0].stride;
  }

  // Elements index to index + kWidth of a sample.
  template <int kWidth>
  __device__ Pack<T, kWidth> read(int64_t sample, int64_t index) const {
    return *reinterpret_cast<const Pack<T, kWidth>*>(data + sample * sample_stride + offset(index));
  }

  // Whether every pack of that many elements lies in memory as one.
  bool in_packs(int width) const {
    bool found = reinterpret_cast<std::uintptr_t>(data) % (width * sizeof(T)) == 0 &&
                 sample_stride % width == 0;
    for (int d = 0; d < loops; ++d) {
      const bool inner = d == loops - 1;
      found = found && (inner ? loop[d].stride == 1 && loop[d].size % width == 0
                              : loop[d].stride % width == 0);
    }
    return found;
  }
};

// The dimensions' order is that of ordered_dimensions. The tensor must outlive what is returned, so
// one of too many loops, or of too many elements for 32 bits, is replaced by a contiguous copy.
template <class T>
Elements<T> elements_of(Tensor& tensor, const std::vector<int64_t>& dims) {
  auto loops = loops_over(tensor, dims);
  if (loops.size() > Elements<T>::kMaxLoops ||
      (loops.size() > 1 && sample_size(tensor) > std::numeric_limits<uint32_t>::max())) {
    tensor = torch::stable::contiguous(tensor);
    loops = loops_over(tensor, ordered_dimensions(tensor, Order::kRowMajor));
  }
  if (loops.empty()) loops.push_back({1, 1});
  Elements<T> elements{static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0),
                       static_cast<int>(loops.size())};
  std::copy(loops.begin(), loops.end(), elements.loop);
  return elements;
}

// Calls body with the width of the packs in which all of them can be read, as a constant.
template <class T, class Body>
void dispatch_width(std::initializer_list<const Elements<T>*> all, Body body) {
  constexpr int kWidth = kPackBytes / sizeof(T);
  bool packed = true;
  for (const auto* elements : all) packed = packed && elements->in_packs(kWidth);
  if (packed) {
    body(std::integral_constant<int, kWidth>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

}  // namespace robustkern
