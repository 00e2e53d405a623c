// Sigma g tap by tap, for covariances of so few displacements that this beats two transforms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "common/fft.h"
#include "common/vectorize.h"

namespace robustkern {
namespace {  // as in fft.h

using torch::stable::Tensor;

// The most taps for which it does, for images of so many pixels. Measured against the other ways,
// on two threads with AVX2, where either takes as long; the form by transforms saves the way back.
inline int64_t most_taps(int64_t channels, int64_t pixels, bool form) {
  if (pixels < 256) return 25;
  if (pixels >= 16384) return form ? 81 : 121;
  if (channels == 1) return form ? 49 : 121;
  if (channels > 8) return 81;  // each frequency's matrix costs the transforms dear
  return form ? 9 : 49;
}

inline bool stencil_pays(const Tensor& gradient, const Tensor& covariance, bool form) {
  return covariance.size(2) * covariance.size(3) <=
         most_taps(gradient.size(1), gradient.size(2) * gradient.size(3), form);
}

template <class T>
class Stencil {
 public:
  // Both contiguous and of dtype T: (N, C, H, W) and (C, C, 2P-1, 2Q-1).
  Stencil(const Tensor& gradient, const Tensor& covariance)
      : gradient_(static_cast<const T*>(gradient.const_data_ptr())),
        taps_(static_cast<const T*>(covariance.const_data_ptr())),
        samples_(gradient.size(0)),
        channels_(gradient.size(1)),
        height_(gradient.size(2)),
        width_(gradient.size(3)),
        rows_(covariance.size(2)),
        columns_(covariance.size(3)),
        stride_((width_ + kBlock - 1) / kBlock * kBlock + columns_ - 1) {}

  // Calls body(sample, channel, g, product) with the gradient's and the product's pixels of every
  // channel of every sample, in parallel.
  template <class Body>
  void for_each_channel(Body body) const {
    const int64_t pixels = height_ * width_, tasks = samples_ * channels_;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> padded(new T[channels_ * height_ * stride_]());
      const std::unique_ptr<T[]> product(new T[pixels]);
      int64_t held = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / channels_, channel = task % channels_;
        if (sample != held) pad(gradient_ + sample * channels_ * pixels, padded.get());
        held = sample;
        const T* taps = taps_ + channel * channels_ * rows_ * columns_;
        multiply(*this, padded.get(), taps, product.get());
        body(sample, channel, gradient_ + task * pixels, product.get());
      }
    });
  }

 private:
  static constexpr int64_t kVectors = 2;
  static constexpr int64_t kBlock = kVectors * kLanes<T>;  // pixels whose sums registers hold

  ROBUSTKERN_INLINE static Vector<T> load_lanes(const T* from) {
    Vector<T> lanes;
    std::memcpy(&lanes, from, kVectorBytes);
    return lanes;
  }

  // Rows with zeros on both sides, as far as the taps reach and a last block may read.
  void pad(const T* image, T* padded) const {
    for (int64_t row = 0; row < channels_ * height_; ++row) {
      std::copy_n(image + row * width_, width_, padded + row * stride_ + columns_ / 2);
    }
  }

  ROBUSTKERN_CLONES static void multiply(const Stencil& s, const T* padded, const T* taps,
                                         T* product) {
    for (int64_t y = 0; y < s.height_; ++y) {
      const int64_t first = std::max<int64_t>(0, s.rows_ / 2 - y);
      const int64_t last = std::min(s.rows_, s.height_ + s.rows_ / 2 - y);
      for (int64_t x = 0; x < s.width_; x += kBlock) {
        // Two sums for each lane, so that one is added to while the other's addition ends.
        Vector<T> even[kVectors] = {}, odd[kVectors] = {};
        for (int64_t other = 0; other < s.channels_; ++other) {
          for (int64_t row = first; row < last; ++row) {
            const T* from = padded + (other * s.height_ + y + row - s.rows_ / 2) * s.stride_ + x;
            const T* tap = taps + (other * s.rows_ + row) * s.columns_;
            int64_t column = 0;
            for (; column + 2 <= s.columns_; column += 2) {
              for (int64_t v = 0; v < kVectors; ++v) {
                even[v] += tap[column] * load_lanes(from + column + v * kLanes<T>);
                odd[v] += tap[column + 1] * load_lanes(from + column + 1 + v * kLanes<T>);
              }
            }
            for (int64_t v = 0; v < kVectors; ++v) {  // their number is odd
              even[v] += tap[column] * load_lanes(from + column + v * kLanes<T>);
            }
          }
        }
        T sums[kBlock];
        for (int64_t v = 0; v < kVectors; ++v) {
          even[v] += odd[v];
          std::memcpy(sums + v * kLanes<T>, &even[v], kVectorBytes);
        }
        std::copy_n(sums, std::min(kBlock, s.width_ - x), product + y * s.width_ + x);
      }
    }
  }

  const T *gradient_, *taps_;
  int64_t samples_, channels_, height_, width_, rows_, columns_, stride_;
};

}  // namespace
}  // namespace robustkern
