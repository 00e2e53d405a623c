// New tensors for results, and how they are written.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <cstdint>

#include "common/flatten.h"
#include "common/vectorize.h"

namespace robustkern {

// A contiguous tensor of the same shape and dtype, not yet written.
//
// Large memory comes fresh from the system, which stops the kernel at the first write to every
// page. Pages of 2 MB instead of 4 KB make that rare.
inline Tensor empty_contiguous(const Tensor& like) {
  Tensor output = torch::stable::new_empty(like, like.sizes());
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHugePageBytes = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(output.mutable_data_ptr());
  const auto end = begin + output.numel() * output.element_size();
  const auto first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const auto last = end / kHugePageBytes * kHugePageBytes;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint
#endif
  return output;
}

// A contiguous (N, *D) tensor that is written tile by tile.
template <class T>
class Output {
 public:
  explicit Output(const Tensor& tensor)
      : data_(static_cast<T*>(tensor.mutable_data_ptr())),
        size_(sample_size(tensor)),
        streamed_(tensor.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes) {}

  // Elements begin to begin + n of a sample become value(0) to value(n - 1).
  template <class Value>
  void write(int64_t sample, int64_t begin, int64_t n, Value value) const {
    T* const tile = data_ + sample * size_ + begin;
    if (streamed_) {
      stream(n, tile, value);
    } else {
      fill(n, tile, value);
    }
  }

 private:
  // More than most caches hold: what is written first would be gone from them when it is read.
  static constexpr int64_t kStreamedBytes = 16 << 20;

  T* data_;
  int64_t size_;
  bool streamed_;
};

}  // namespace robustkern
