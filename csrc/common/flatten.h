// One tensor (N, *D) of any strides, read as a flat array per sample.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace robustkern {

using torch::stable::Tensor;

// What is read, worked on and written at a time: a few tiles fit the L1 cache.
constexpr int64_t kTileElements = 4096;

inline int64_t sample_count(const Tensor& tensor) { return tensor.size(0); }

inline int64_t sample_size(const Tensor& tensor) {
  return tensor.size(0) == 0 ? 0 : tensor.numel() / tensor.size(0);
}

enum class Order {
  kRowMajor,  // of the elements' indices: that of a contiguous output
  kMemory,    // of the first tensor's memory: the fastest, where any order will do
};

// The dimensions of a sample from the slowest to the fastest. Tensors that are read side by side
// share the order, which the first one decides.
inline std::vector<int64_t> ordered_dimensions(const Tensor& first, Order order) {
  std::vector<int64_t> dims;
  for (int64_t d = 1; d < first.dim(); ++d) {
    if (first.size(d) != 1) dims.push_back(d);
  }
  if (order == Order::kMemory) {
    std::stable_sort(dims.begin(), dims.end(),
                     [&](int64_t a, int64_t b) { return first.stride(a) > first.stride(b); });
  }
  return dims;
}

struct Loop {
  int64_t size, stride;
};

// The fewest loops that visit a sample's elements with these dimensions from slow to fast.
inline std::vector<Loop> loops_over(const Tensor& tensor, const std::vector<int64_t>& dims) {
  std::vector<Loop> loops;
  for (int64_t d : dims) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (!loops.empty() && loops.back().stride == stride * size) {
      loops.back() = {loops.back().size * size, stride};  // one longer loop over both
    } else {
      loops.push_back({size, stride});
    }
  }
  return loops;
}

template <class T>
class Flattened {
 public:
  Flattened(const Tensor& tensor, const std::vector<int64_t>& dims)
      : data_(static_cast<const T*>(tensor.const_data_ptr())),
        sample_stride_(tensor.stride(0)),
        loops_(loops_over(tensor, dims)),
        flat_(loops_.empty() || (loops_.size() == 1 && loops_[0].stride == 1)) {}

  // Elements begin to begin + n of a sample: in place where they lie side by side, else gathered
  // into the buffer, which holds kTileElements.
  const T* read(int64_t sample, int64_t begin, int64_t n, T* buffer) const {
    const T* first = data_ + sample * sample_stride_;
    if (flat_) return first + begin;
    gather(first, begin, n, buffer);
    return buffer;
  }

 private:
  // Each loop at least doubles the number of elements, so no tensor has more.
  static constexpr int kMaxLoops = 63;

  void gather(const T* first, int64_t begin, int64_t n, T* buffer) const {
    const int inner = static_cast<int>(loops_.size()) - 1;
    int64_t index[kMaxLoops];
    for (int d = inner; d >= 0; --d) {
      index[d] = begin % loops_[d].size;
      begin /= loops_[d].size;
      first += index[d] * loops_[d].stride;
    }
    while (true) {
      const int64_t run = std::min(n, loops_[inner].size - index[inner]);
      const int64_t stride = loops_[inner].stride;
      for (int64_t i = 0; i < run; ++i) buffer[i] = first[i * stride];
      buffer += run;
      n -= run;
      if (n == 0) return;
      first -= index[inner] * stride;  // back to the start of the innermost loop,
      index[inner] = 0;
      int d = inner - 1;  // and one step on in the next one that has any left
      for (; ++index[d] == loops_[d].size; --d) {
        first -= (loops_[d].size - 1) * loops_[d].stride;
        index[d] = 0;
      }
      first += loops_[d].stride;
    }
  }

  const T* data_;
  int64_t sample_stride_;
  std::vector<Loop> loops_;
  bool flat_;
};

}  // namespace robustkern
