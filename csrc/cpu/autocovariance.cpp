// K[c, c', d] = mean of p_c(i) p_c'(i + d): spectra multiplied and summed over the batch, then
// brought back once.

#include <torch/csrc/stable/library.h>

#include "common/images.h"
#include "common/output.h"
#include "common/spectral.h"

namespace robustkern {
namespace {

// Sums of a fixed number of slices of the batch, so that the result does not depend on the number
// of threads. A slice's sums are as large as a covariance's spectrum, so large images have few.
constexpr int64_t kSlices = 16, kSliceBands = 64;

// Adds conj(z_c) z_c' of one band and its mirror, (2, C, x.length), to the sums of all c <= c'.
template <class T>
ROBUSTKERN_CLONES void add_band(const Grid<T>& grid, const Complex<T>* spectrum, Complex<T>* sums) {
  const int64_t channels = grid.channels, nx = grid.x.length;
  const Complex<T>* const mirror = spectrum + channels * nx;
  for (int64_t k = 0; k < nx; ++k) {
    for (int64_t c = 0; c < channels; ++c) {
      const Complex<T> a = spectrum[c * nx + k], b = mirror[c * nx + (k ? nx - k : 0)];
      for (int64_t d = c; d < channels; ++d, ++sums) {
        const Complex<T> e = spectrum[d * nx + k], f = mirror[d * nx + (k ? nx - k : 0)];
        sums->re += a.re * e.re + a.im * e.im + b.re * f.re + b.im * f.im;
        sums->im += a.re * e.im - a.im * e.re + b.im * f.re - b.re * f.im;
      }
    }
  }
}

// Two of the sums, x and y, as the spectrum x + i y of a pair of real arrays: (2, x.length).
template <class T>
ROBUSTKERN_CLONES void pack_band(int64_t length, int64_t arrays, int64_t slices, int64_t slice_size,
                                 const Complex<T>* sums, bool both, Complex<T>* band) {
  for (int64_t k = 0; k < length; ++k, sums += arrays) {
    Complex<T> x{}, y{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      x = x + sums[slice * slice_size];
      if (both) y = y + sums[slice * slice_size + 1];
    }
    band[k] = {x.re - y.im, x.im + y.re};
    band[length + (k ? length - k : 0)] = {x.re + y.im, y.re - x.im};
  }
}

// The sums over the batch, (slices, bands, x.length, arrays).
template <class T>
Buffer<T> sum_spectra(const Grid<T>& grid, const T* perturbation, int64_t samples, int64_t arrays,
                      int64_t slices) {
  const int64_t nx = grid.x.length, pairs = (samples + 1) / 2;
  const int64_t slice_size = grid.bands * nx * arrays;
  auto sums = make_buffer<T>(slices * slice_size);
  parallel_if_many(slices, [&](int64_t begin, int64_t end) {
    const auto work = make_buffer<T>(work_size(grid));
    for (int64_t slice = begin; slice < end; ++slice) {
      Complex<T>* const total = sums.get() + slice * slice_size;
      std::fill_n(total, slice_size, Complex<T>{});
      const auto one_pair = [&](int64_t, Pair<const T> pair) {
        transform_columns(grid, pair, work.get());
        torch::stable::parallel_for(0, grid.bands, 1, [&](int64_t first, int64_t last) {
          const auto buffer = make_buffer<T>(2 * nx * (grid.channels + 1));
          const auto spectrum = buffer.get(), scratch = spectrum + 2 * nx * grid.channels;
          for (int64_t band = first; band < last; ++band) {
            transform_band(grid, work.get(), band, spectrum, scratch);
            add_band(grid, spectrum, total + band * nx * arrays);
          }
        });
      };
      for_each_pair(grid, perturbation, 2 * (slice * pairs / slices),
                    std::min(2 * ((slice + 1) * pairs / slices), samples), one_pair);
    }
  });
  return sums;
}

// 1 / (length M(d)) for displacements d = 0, 1, ..., where M counts the pixel pairs at that
// distance.
inline std::vector<double> mean_factors(int64_t size, int64_t length, bool unbiased) {
  std::vector<double> factors;
  for (int64_t d = 0; d < size; ++d) {
    factors.push_back(1.0 / static_cast<double>(length * (unbiased ? size - d : size)));
  }
  return factors;
}

// kLanes columns of a pair of arrays, from the first one on, out of rows over vertical
// displacements modulo the grid. `x_factors` is indexed by the column, and zero where there is
// none.
template <class T>
ROBUSTKERN_CLONES void store_displacements(const Grid<T>& grid, const Complex<T>* rows,
                                           const double* y_factors, const T* x_factors,
                                           int64_t column, Pair<T> arrays) {
  const int64_t h = grid.height, w = grid.width, ny = grid.y.length, nx = grid.x.length;
  const DisplacementLanes<T> lanes(grid, column);
  const Vector<T> x_factor = load(x_factors + column, kLanes<T>);
  for (int64_t d = 1 - h; d < h; ++d) {
    const T y_factor = static_cast<T>(y_factors[std::abs(d)]);
    const T cosine = grid.twist[2 * std::abs(d)] * y_factor;
    const T sine = grid.twist[2 * std::abs(d) + 1] * y_factor;
    const Complex<T> z = times(rows[d < 0 ? d + ny : d], cosine, d < 0 ? -sine : sine);
    const auto store_lanes = [&](const Vector<T>& v, T* array) {
      T* const zero = array + (d + h - 1) * (2 * w - 1) + w - 1;
      T values[kLanes<T>];
      store(values, v, kLanes<T>);
      for (int64_t lane = 0; lane < lanes.right; ++lane) zero[column + lane] = values[lane];
      for (int64_t lane = lanes.left; lane < lanes.last; ++lane) {
        zero[column + lane - nx] = values[lane];
      }
    };
    store_lanes(z.re * x_factor, arrays.first);
    if (arrays.second) store_lanes(z.im * x_factor, arrays.second);
  }
}

template <class T>
void autocovariance(const Grid<T>& grid, const T* perturbation, int64_t samples, bool unbiased,
                    T* covariance) {
  const int64_t channels = grid.channels, ny = grid.y.length, nx = grid.x.length;
  const int64_t size = (2 * grid.height - 1) * (2 * grid.width - 1);
  std::vector<T*> arrays;  // K[c, c'] for c <= c'
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t d = c; d < channels; ++d) arrays.push_back(covariance + (c * channels + d) * size);
  }
  const int64_t count = static_cast<int64_t>(arrays.size()), pairs = (count + 1) / 2;
  const int64_t most = std::max<int64_t>(1, std::min(kSlices, kSliceBands / grid.bands));
  const int64_t slices = std::min(most, (samples + 1) / 2);
  const auto sums = sum_spectra(grid, perturbation, samples, count, slices);

  const auto work = make_buffer<T>(pairs * nx * grid.row);
  torch::stable::parallel_for(0, pairs * grid.bands, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = make_buffer<T>(4 * nx);
    const auto band = buffer.get(), scratch = band + 2 * nx;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / grid.bands, index = task % grid.bands;
      pack_band(nx, count, slices, grid.bands * nx * count,
                sums.get() + index * nx * count + 2 * pair, 2 * pair + 1 < count, band);
      for (int64_t side = 0; side < 2; ++side) {
        Complex<T>* to = work.get() + pair * nx * grid.row + 2 * index + side;
        transform<T, true, false>(grid.x, {band + side * nx, 1}, {to, grid.row}, scratch);
      }
    }
  });

  const auto y_factors = mean_factors(grid.height, ny, unbiased);
  const auto factors = mean_factors(grid.width, nx, unbiased);
  const int64_t strips = strips_of<T>(nx);
  std::vector<T> x_factors(strips * kLanes<T>);
  for (int64_t d = 0; d < grid.width; ++d) {
    // Half: a frequency and its mirror were both added.
    x_factors[d] = static_cast<T>(factors[d] / static_cast<double>(2 * samples));
    if (d) x_factors[nx - d] = x_factors[d];
  }
  torch::stable::parallel_for(0, pairs * strips, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = make_buffer<T>(3 * ny);
    const auto rows = buffer.get(), scratch = rows + ny;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / strips, column = task % strips * kLanes<T>;
      transpose_bands<false>(grid, rows, std::min(kLanes<T>, nx - column),
                             work.get() + (pair * nx + column) * grid.row);
      transform<T, true, false>(grid.y, {rows, 1}, {rows, 1}, scratch);
      const bool both = 2 * pair + 1 < count;
      store_displacements(grid, rows, y_factors.data(), x_factors.data(), column,
                          {arrays[2 * pair], both ? arrays[2 * pair + 1] : nullptr});
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t d = c + 1; d < channels; ++d) {
      const T* array = covariance + (c * channels + d) * size;
      std::reverse_copy(array, array + size, covariance + (d * channels + c) * size);
    }
  }
}

Tensor autocovariance_cpu(const Tensor& perturbation, bool unbiased) {
  check_images("autocovariance", perturbation);
  const Tensor p = contiguous_as(perturbation, per_sample_dtype(perturbation));
  const int64_t channels = p.size(1), height = p.size(2), width = p.size(3);
  Tensor covariance =
      torch::stable::new_empty(p, {channels, channels, 2 * height - 1, 2 * width - 1});
  if (p.size(0) == 0) return torch::stable::zero_(covariance);
  dispatch_sums(p, [&](auto zero) {
    using T = decltype(zero);
    const Grid<T> grid(channels, height, width);
    autocovariance(grid, static_cast<const T*>(p.const_data_ptr()), p.size(0), unbiased,
                   static_cast<T*>(covariance.mutable_data_ptr()));
  });
  return covariance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("autocovariance", TORCH_BOX(&autocovariance_cpu));
}

}  // namespace robustkern
