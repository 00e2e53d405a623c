// Parallel loops over the samples of K tensors of one shape (N, *D), one dtype and any strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/flatten.h"

namespace robustkern {

template <class T, size_t K>
class Samples {
 public:
  Samples(Order order, const std::array<Tensor, K>& tensors)
      : Samples(tensors, ordered_dimensions(tensors[0], order), std::make_index_sequence<K>()) {}

  // Calls body(sample, begin, n, tiles...) for every tile of every sample, in parallel: the tiles
  // are the K tensors' elements begin to begin + n of that sample.
  template <class Body>
  void for_each_tile(Body body) const {
    for_each_chunk([&](int64_t sample, int64_t chunk) { tiles_of_chunk(sample, chunk, body); });
  }

  // Calls body(sample, begin, n, tiles...) for every tile of one sample.
  template <class Body>
  void for_each_tile_of(int64_t sample, Body body) const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) tiles_of_chunk(sample, chunk, body);
  }

  // Calls body(sample) for every sample, in parallel.
  template <class Body>
  void for_each_sample(Body body) const {
    torch::stable::parallel_for(0, count_, samples_per_task(), [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) body(sample);
    });
  }

  // For each sample, value(sample, n, tiles...) of all its tiles, combined.
  template <class Value, class Combine>
  std::vector<double> reduce(Value value, Combine combine) const {
    std::vector<double> partials(count_ * chunks_), totals(count_, 0.0);
    for_each_chunk([&](int64_t sample, int64_t chunk) {
      partials[sample * chunks_ + chunk] = reduce_chunk(sample, chunk, value, combine);
    });
    for (int64_t i = 0; i < count_ * chunks_; ++i) {
      totals[i / chunks_] = combine(totals[i / chunks_], partials[i]);
    }
    return totals;
  }

  // The same for one sample, to the last bit.
  template <class Value, class Combine>
  double reduce_sample(int64_t sample, Value value, Combine combine) const {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      total = combine(total, reduce_chunk(sample, chunk, value, combine));
    }
    return total;
  }

 private:
  // One task of a parallel loop. Fixed, so that sums do not depend on the number of threads.
  static constexpr int64_t kChunkElements = 8 * kTileElements;

  template <size_t... k>
  Samples(const std::array<Tensor, K>& tensors, const std::vector<int64_t>& dims,
          std::index_sequence<k...>)
      : flattened_{Flattened<T>(tensors[k], dims)...},
        count_(sample_count(tensors[0])),
        size_(sample_size(tensors[0])),
        chunks_((size_ + kChunkElements - 1) / kChunkElements) {}

  // Small samples share a task, so that a thread has enough to do.
  int64_t samples_per_task() const {
    return std::max<int64_t>(kChunkElements / std::max<int64_t>(size_, 1), 1);
  }

  template <class Body>
  void for_each_chunk(Body body) const {
    const int64_t tasks = count_ * chunks_;
    torch::stable::parallel_for(0, tasks, samples_per_task(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task / chunks_, task % chunks_);
    });
  }

  template <class Body>
  void tiles_of_chunk(int64_t sample, int64_t chunk, Body& body) const {
    T buffers[K][kTileElements];
    const int64_t end = std::min(size_, (chunk + 1) * kChunkElements);
    for (int64_t begin = chunk * kChunkElements; begin < end; begin += kTileElements) {
      const int64_t n = std::min(kTileElements, end - begin);
      read_tiles(sample, begin, n, buffers, body, std::make_index_sequence<K>());
    }
  }

  template <class Body, size_t... k>
  void read_tiles(int64_t sample, int64_t begin, int64_t n, T (*buffers)[kTileElements], Body& body,
                  std::index_sequence<k...>) const {
    body(sample, begin, n, flattened_[k].read(sample, begin, n, buffers[k])...);
  }

  template <class Value, class Combine>
  double reduce_chunk(int64_t sample, int64_t chunk, Value& value, Combine& combine) const {
    double total = 0;
    auto body = [&](int64_t, int64_t, int64_t n, auto... tiles) {
      total = combine(total, value(sample, n, tiles...));
    };
    tiles_of_chunk(sample, chunk, body);
    return total;
  }

  std::array<Flattened<T>, K> flattened_;
  int64_t count_, size_, chunks_;
};

}  // namespace robustkern
