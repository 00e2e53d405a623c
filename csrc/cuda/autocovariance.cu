// K[c, c', d] = mean of p_c(i) p_c'(i + d): spectra multiplied and summed over the batch, then
// brought back once. The transforms are torch's.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/elements.cuh"
#include "common/images.h"
#include "common/launch.cuh"

namespace robustkern {
namespace {

constexpr int kTile = 32;  // neighbouring frequencies that threads of one warp take
// Threads of the batch's sum, more than any device runs at once.
constexpr int64_t kThreads = 1 << 19;

template <class W>
struct Complex {
  W re, im;
};

// Pairs of channels c <= c', in order: (0, 0), (0, 1), ...
struct ChannelPair {
  int64_t first, second;

  __device__ ChannelPair(int64_t pair, int64_t channels) : first(0), second(pair) {
    for (; second >= channels - first; ++first) second -= channels - first;
    second += first;
  }
};

__device__ inline int64_t pair_index(int64_t first, int64_t second, int64_t channels) {
  return first * channels - first * (first - 1) / 2 + second - first;
}

// sums[slice][pair] = sum over a slice of the samples of conj(spectrum of c) spectrum of c'. The
// pairs of a tile of frequencies have neighbouring warps, which share what they read.
template <class W>
__global__ void __launch_bounds__(kBlockThreads)
    cross_spectrum_kernel(const Complex<W>* const spectra,  // (samples, channels, frequencies)
                          const int64_t samples, const uint32_t channels, const int64_t frequencies,
                          const int64_t slices, const int64_t slice_samples,
                          Complex<W>* const sums)  // (slices, pairs, frequencies)
{
  const auto pairs = static_cast<uint32_t>(channels * (channels + 1) / 2);
  const auto tiles = static_cast<uint32_t>((frequencies + kTile - 1) / kTile);
  const uint32_t warp = thread_index() / kTile, tile = warp / pairs, pair = warp % pairs;
  const int64_t slice = tile / tiles;
  const int64_t frequency = static_cast<int64_t>(tile % tiles) * kTile + threadIdx.x % kTile;
  if (slice >= slices || frequency >= frequencies) return;
  const ChannelPair channel(pair, channels);
  const int64_t begin = slice * slice_samples;
  const int64_t end = begin + slice_samples < samples ? begin + slice_samples : samples;
  Complex<W> sum{0, 0};
#pragma unroll 4
  for (int64_t sample = begin; sample < end; ++sample) {
    const Complex<W>* const spectrum = spectra + sample * channels * frequencies + frequency;
    const Complex<W> a = spectrum[channel.first * frequencies];
    const Complex<W> b = spectrum[channel.second * frequencies];
    sum.re += a.re * b.re + a.im * b.im;
    sum.im += a.re * b.im - a.im * b.re;
  }
  sums[(slice * pairs + pair) * frequencies + frequency] = sum;
}

// The means over pixel pairs, out of sums over displacements modulo the grid. K[c', c] is K[c, c']
// backwards.
template <class W>
__global__ void __launch_bounds__(kBlockThreads)
    mean_kernel(const W* const sums,  // (pairs, grid_height, grid_width)
                const int64_t grid_height, const int64_t grid_width, const int64_t samples,
                const uint32_t channels, const int64_t height, const int64_t width,
                const bool unbiased,
                W* const covariance)  // (channels, channels, 2 height - 1, 2 width - 1)
{
  const uint32_t rows = 2 * height - 1, columns = 2 * width - 1, index = thread_index();
  if (index >= channels * channels * rows * columns) return;
  const uint32_t row = index / columns, image = row / rows, first = image / channels;
  const int64_t c = first, d = image - first * channels;
  const int64_t dy = static_cast<int64_t>(row % rows) - (height - 1);
  const int64_t dx = static_cast<int64_t>(index % columns) - (width - 1);
  const int64_t sign = c <= d ? 1 : -1;
  const int64_t pair = c <= d ? pair_index(c, d, channels) : pair_index(d, c, channels);
  const int64_t y = sign * dy < 0 ? sign * dy + grid_height : sign * dy;
  const int64_t x = sign * dx < 0 ? sign * dx + grid_width : sign * dx;
  const int64_t overlap = (height - (dy < 0 ? -dy : dy)) * (width - (dx < 0 ? -dx : dx));
  const double count = static_cast<double>(samples * (unbiased ? overlap : height * width));
  covariance[index] = static_cast<W>(sums[(pair * grid_height + y) * grid_width + x] / count);
}

// torch.fft's rfft2 or irfft2, at the given size.
Tensor transform(const char* name, const Tensor& images, const std::vector<int64_t>& size) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(images), from(std::optional(size)),
                                    from(std::vector<int64_t>{-2, -1}),
                                    from(std::optional<std::string>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(to<Tensor>(stack[0]));
}

// An even number with no prime factor above 5, the least that keeps displacements apart.
int64_t grid_length(int64_t size) {
  for (int64_t length = 2 * size;; length += 2) {
    int64_t rest = length;
    for (int64_t prime : {2, 3, 5}) {
      while (rest % prime == 0) rest /= prime;
    }
    if (rest == 1) return length;
  }
}

Tensor autocovariance_cuda(const Tensor& perturbation, bool unbiased) {
  check_images("autocovariance", perturbation);
  const Launcher launch(perturbation);
  const int64_t samples = perturbation.size(0), channels = perturbation.size(1);
  const int64_t height = perturbation.size(2), width = perturbation.size(3);
  const ScalarType dtype = per_sample_dtype(perturbation);
  Tensor covariance = torch::stable::new_empty(
      perturbation, {channels, channels, 2 * height - 1, 2 * width - 1}, dtype);
  if (samples == 0) return torch::stable::zero_(covariance);
  STD_TORCH_CHECK(covariance.numel() <= std::numeric_limits<uint32_t>::max(),
                  "autocovariance: expected at most 2^32 displacements");
  const std::vector<int64_t> grid{grid_length(height), grid_length(width)};
  const Tensor p =
      perturbation.scalar_type() == dtype ? perturbation : torch::stable::to(perturbation, dtype);
  const Tensor spectra = transform("aten::fft_rfft2", p, grid);
  const int64_t pairs = channels * (channels + 1) / 2, rows = grid[0], columns = grid[1] / 2 + 1;
  const int64_t frequencies = rows * columns;
  const int64_t most = std::min(samples, kThreads / (pairs * frequencies) + 1);
  const int64_t slice_samples = (samples + most - 1) / most;
  const int64_t slices = (samples + slice_samples - 1) / slice_samples;
  const int64_t warps = slices * pairs * ((frequencies + kTile - 1) / kTile);
  Tensor partial = torch::stable::new_empty(spectra, {slices, pairs, rows, columns});
  dispatch_sums(p, [&](auto zero) {
    using W = decltype(zero);
    launch(cross_spectrum_kernel<W>, warps * kTile,
           static_cast<const Complex<W>*>(spectra.const_data_ptr()), samples,
           static_cast<uint32_t>(channels), frequencies, slices, slice_samples,
           static_cast<Complex<W>*>(partial.mutable_data_ptr()));
    const int64_t over = 0;
    const Tensor sums =
        transform("aten::fft_irfft2", torch::stable::sum(partial, {{&over, 1}}), grid);
    launch(mean_kernel<W>, covariance.numel(), static_cast<const W*>(sums.const_data_ptr()),
           grid[0], grid[1], samples, static_cast<uint32_t>(channels), height, width, unbiased,
           static_cast<W*>(covariance.mutable_data_ptr()));
  });
  return covariance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CUDA, m) {
  m.impl("autocovariance", TORCH_BOX(&autocovariance_cuda));
}

}  // namespace robustkern
