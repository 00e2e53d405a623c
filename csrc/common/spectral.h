// Spectra of images, two images in one complex transform, for products over pixel displacements.
//
// An image is transformed down its columns first, kLanes columns side by side as they lie in
// memory, and then along its rows, kLanes vertical frequencies side by side. The second transform,
// whatever is done to the spectrum, and the way back touch one band of vertical frequencies at a
// time, so the whole spectrum of an image is never in memory.
//
// Vertical frequencies are odd multiples of half a step: row d is turned by exp(-i pi d / length)
// first. Then each has its negative among the others, none is its own negative, and two real images
// packed as one complex image come apart without special cases. A band holds frequencies
// k = 0, 1, ..., length / 2 - 1, and its mirror the frequencies length - 1 - k in the same lanes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/dtype.h"
#include "common/fft.h"

namespace robustkern {
namespace {  // as in fft.h

template <class T>
using Buffer = std::unique_ptr<Complex<T>[]>;

template <class T>
Buffer<T> make_buffer(int64_t size) {
  return Buffer<T>(new Complex<T>[size]);  // not written yet
}

template <class T>
struct Grid {
  Grid(int64_t channels, int64_t height, int64_t width)
      : channels(channels),
        height(height),
        width(width),
        y(transform_length(height)),
        x(transform_length(width)),
        bands((y.length / 2 + kLanes<T> - 1) / kLanes<T>),
        row(2 * bands + 1) {
    for (int64_t d = 0; d < height; ++d) {
      const double angle = M_PI * static_cast<double>(d) / static_cast<double>(y.length);
      twist.push_back(static_cast<T>(std::cos(angle)));
      twist.push_back(static_cast<T>(std::sin(angle)));
    }
  }

  int64_t channels, height, width;
  Plan<T> y, x;
  int64_t bands;
  // Vectors from one column of a half-way transform to the next: bands, each with its mirror, and
  // one unused, for columns a power of two apart would share few cache lines.
  int64_t row;
  std::vector<T> twist;  // cos and sin of pi d / y.length
};

// Two images in a complex one, the second as its imaginary part; null for none. The scales are
// applied on the way in and taken back on the way out.
template <class T>
struct Pair {
  T *first, *second;
  std::remove_const_t<T> first_scale = 1, second_scale = 1;

  // The same, further on in both images.
  Pair operator+(int64_t offset) const {
    return {first ? first + offset : nullptr, second ? second + offset : nullptr, first_scale,
            second_scale};
  }
};

// Transposes a tile of kLanes x kLanes from and to rows anywhere, in blocks of the narrowest
// vectors, which every machine has.
template <class T>
void transpose(const T* const* from, T* const* to) {
  typedef T Block __attribute__((vector_size(16)));
  constexpr int kSide = 16 / sizeof(T);
  for (int64_t r = 0; r < kLanes<T>; r += kSide) {
    for (int64_t l = 0; l < kLanes<T>; l += kSide) {
      Block a[kSide], b[kSide];
      for (int i = 0; i < kSide; ++i) std::memcpy(&a[i], from[r + i] + l, 16);
      if constexpr (kSide == 4) {
        const Block c = {a[0][0], a[1][0], a[0][1], a[1][1]};
        const Block d = {a[2][0], a[3][0], a[2][1], a[3][1]};
        const Block e = {a[0][2], a[1][2], a[0][3], a[1][3]};
        const Block f = {a[2][2], a[3][2], a[2][3], a[3][3]};
        b[0] = Block{c[0], c[1], d[0], d[1]};
        b[1] = Block{c[2], c[3], d[2], d[3]};
        b[2] = Block{e[0], e[1], f[0], f[1]};
        b[3] = Block{e[2], e[3], f[2], f[3]};
      } else {
        b[0] = Block{a[0][0], a[1][0]};
        b[1] = Block{a[0][1], a[1][1]};
      }
      for (int i = 0; i < kSide; ++i) std::memcpy(to[l + i] + r, &b[i], 16);
    }
  }
}

// Transposes between `frequencies`, one vertical frequency after the other with `count` columns in
// the lanes, and `work`, one column after the other with bands of frequencies in the lanes.
template <bool kToWork, class T>
void transpose_bands(const Grid<T>& grid, Complex<T>* frequencies, int64_t count,
                     Complex<T>* work) {
  Complex<T> zero{}, sink;  // in place of lanes without a column or a frequency
  const int64_t half = grid.y.length / 2;
  for (int64_t offset = 0; offset < 2 * grid.bands; ++offset) {
    const T* from[2][kLanes<T>];
    T* to[2][kLanes<T>];
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t k = offset / 2 * kLanes<T> + lane, mirrored = grid.y.length - 1 - k;
      Complex<T>* const column = lane < count ? work + lane * grid.row + offset : nullptr;
      Complex<T>* const frequency = k < half ? frequencies + (offset % 2 ? mirrored : k) : nullptr;
      Complex<T>* source = kToWork ? frequency : column;
      Complex<T>* target = kToWork ? column : frequency;
      if (!source) source = &zero;
      if (!target) target = &sink;
      from[0][lane] = reinterpret_cast<const T*>(&source->re);
      from[1][lane] = reinterpret_cast<const T*>(&source->im);
      to[0][lane] = reinterpret_cast<T*>(&target->re);
      to[1][lane] = reinterpret_cast<T*>(&target->im);
    }
    transpose(from[0], to[0]);
    transpose(from[1], to[1]);
  }
}

template <class T>
ROBUSTKERN_INLINE Vector<T> load(const T* from, int64_t count) {
  Vector<T> v{};
  if (count == kLanes<T>) {
    std::memcpy(&v, from, kVectorBytes);
  } else {
    std::memcpy(&v, from, count * sizeof(T));
  }
  return v;
}

template <class T>
ROBUSTKERN_INLINE void store(T* to, const Vector<T>& v, int64_t count) {
  if (count == kLanes<T>) {
    std::memcpy(to, &v, kVectorBytes);
  } else {
    std::memcpy(to, &v, count * sizeof(T));
  }
}

template <class T>
ROBUSTKERN_CLONES double sum_of_squares(const T* values, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    total += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  return total;
}

// The power of two that brings the root mean square near one. A sample without one has its
// product's elements here instead: 0 if it is zero, NaN if it is not finite.
template <class T>
T normalizing_scale(const T* values, int64_t count) {
  const double squares = sum_of_squares(values, count);
  if (squares == 0) return 0;
  if (!std::isfinite(squares)) return std::numeric_limits<T>::quiet_NaN();
  int exponent = 0;
  std::frexp(std::sqrt(squares / static_cast<double>(count)), &exponent);
  return static_cast<T>(std::ldexp(1.0, std::max(-100, std::min(100, -exponent))));
}

// Samples made equally large, for the rounding errors of one reach the other, and those without a
// scale left out.
template <class T>
Pair<const T> normalize(const Grid<T>& grid, Pair<const T> pair) {
  const int64_t size = grid.channels * grid.height * grid.width;
  if (pair.first) pair.first_scale = normalizing_scale(pair.first, size);
  if (pair.second) pair.second_scale = normalizing_scale(pair.second, size);
  if (!(pair.first_scale > 0)) pair.first = nullptr;
  if (!(pair.second_scale > 0)) pair.second = nullptr;
  return pair;
}

// `count` columns of a pair's rows, turned.
template <class T>
ROBUSTKERN_CLONES void load_rows(const Grid<T>& grid, Pair<const T> rows, int64_t count,
                                 Complex<T>* to) {
  for (int64_t d = 0; d < grid.height; ++d) {
    const int64_t at = d * grid.width;
    Complex<T> z{};
    if (rows.first) z.re = load(rows.first + at, count) * rows.first_scale;
    if (rows.second) z.im = load(rows.second + at, count) * rows.second_scale;
    to[d] = times(z, grid.twist[2 * d], -grid.twist[2 * d + 1]);
  }
}

template <class T>
ROBUSTKERN_CLONES void store_rows(const Grid<T>& grid, const Complex<T>* from, int64_t count,
                                  Pair<T> rows) {
  for (int64_t d = 0; d < grid.height; ++d) {
    const Complex<T> z = times(from[d], grid.twist[2 * d], grid.twist[2 * d + 1]);
    const int64_t at = d * grid.width;
    if (rows.first) store(rows.first + at, z.re * (1 / rows.first_scale), count);
    if (rows.second) store(rows.second + at, z.im * (1 / rows.second_scale), count);
  }
}

// How many vectors hold this many columns.
template <class T>
int64_t strips_of(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T>;
}

// Vectors that the half-way transforms of one pair need.
template <class T>
int64_t work_size(const Grid<T>& grid) {
  return grid.channels * grid.x.length / 2 * grid.row;
}

// A pair of samples (C, H, W), transformed down its columns: (C, x.length / 2, row), zero beyond W.
template <class T>
void transform_columns(const Grid<T>& grid, Pair<const T> samples, Complex<T>* work) {
  const int64_t strips = strips_of<T>(grid.width), half = grid.x.length / 2;
  torch::stable::parallel_for(0, grid.channels * strips, 1, [&](int64_t begin, int64_t end) {
    const auto frequencies = make_buffer<T>(3 * grid.y.length);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / strips, column = task % strips * kLanes<T>;
      const int64_t at = channel * grid.height * grid.width + column;
      const int64_t count = std::min(kLanes<T>, grid.width - column);
      const auto rows = frequencies.get(), scratch = rows + grid.y.length;
      load_rows(grid, samples + at, count, rows);
      std::fill(rows + grid.height, rows + grid.y.length / 2, Complex<T>{});
      transform<T, false, true>(grid.y, {rows, 1}, {rows, 1}, scratch);
      Complex<T>* const image = work + channel * half * grid.row;
      transpose_bands<true>(grid, rows, count, image + column * grid.row);
      if (column + count == grid.width) {
        std::fill_n(image + grid.width * grid.row, (half - grid.width) * grid.row, Complex<T>{});
      }
    }
  });
}

// The way back.
template <class T>
void untransform_columns(const Grid<T>& grid, Complex<T>* work, Pair<T> samples) {
  const int64_t strips = strips_of<T>(grid.width), half = grid.x.length / 2;
  torch::stable::parallel_for(0, grid.channels * strips, 1, [&](int64_t begin, int64_t end) {
    const auto frequencies = make_buffer<T>(3 * grid.y.length);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / strips, column = task % strips * kLanes<T>;
      const int64_t at = channel * grid.height * grid.width + column;
      const int64_t count = std::min(kLanes<T>, grid.width - column);
      const auto rows = frequencies.get(), scratch = rows + grid.y.length;
      transpose_bands<false>(grid, rows, count, work + (channel * half + column) * grid.row);
      transform<T, true, true>(grid.y, {rows, 1}, {rows, 1}, scratch);
      store_rows(grid, rows, count, samples + at);
    }
  });
}

// One band and its mirror of a pair's spectrum: (2, C, x.length).
template <class T>
void transform_band(const Grid<T>& grid, Complex<T>* work, int64_t band, Complex<T>* spectrum,
                    Complex<T>* scratch) {
  for (int64_t side = 0; side < 2; ++side) {
    for (int64_t channel = 0; channel < grid.channels; ++channel, spectrum += grid.x.length) {
      Complex<T>* column = work + channel * grid.x.length / 2 * grid.row + 2 * band + side;
      transform<T, false, true>(grid.x, {column, grid.row}, {spectrum, 1}, scratch);
    }
  }
}

template <class T>
void untransform_band(const Grid<T>& grid, Complex<T>* spectrum, int64_t band, Complex<T>* work,
                      Complex<T>* scratch) {
  for (int64_t side = 0; side < 2; ++side) {
    for (int64_t channel = 0; channel < grid.channels; ++channel, spectrum += grid.x.length) {
      Complex<T>* column = work + channel * grid.x.length / 2 * grid.row + 2 * band + side;
      transform<T, true, true>(grid.x, {spectrum, 1}, {column, grid.row}, scratch);
    }
  }
}

// Calls body(begin, end) for ranges of tasks in parallel, or, where there are too few for that, for
// all of them at once, which leaves the threads to what the body does.
template <class Body>
void parallel_if_many(int64_t tasks, Body body) {
  const int64_t grain = tasks < torch::stable::get_num_threads() ? tasks : 1;
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(grain, 1), body);
}

// Calls body(sample, pair) for all samples of (N, C, H, W), two by two.
template <class T, class Body>
void for_each_pair(const Grid<T>& grid, const T* data, int64_t begin, int64_t end, Body body) {
  const int64_t size = grid.channels * grid.height * grid.width;
  for (int64_t sample = begin; sample < end; sample += 2) {
    const T* first = data + sample * size;
    body(sample, Pair<const T>{first, sample + 1 < end ? first + size : nullptr});
  }
}

// Which of kLanes columns of the grid hold a horizontal displacement: lanes below `right` that of
// their column, and lanes `left` to `last` their column less the grid's length.
template <class T>
struct DisplacementLanes {
  DisplacementLanes(const Grid<T>& grid, int64_t column)
      : right(clamp(grid.width - column)),
        left(clamp(grid.x.length - grid.width + 1 - column)),
        last(std::max(left, clamp(grid.x.length - column))) {}

  static int64_t clamp(int64_t lane) { return std::max<int64_t>(0, std::min(kLanes<T>, lane)); }

  int64_t right, left, last;
};

// kLanes columns of real arrays over displacements, (2H-1, 2W-1), turned; a negative displacement
// lies at the end of the grid. Other rows stay as they are.
template <class T>
ROBUSTKERN_CLONES void load_displacements(const Grid<T>& grid, Pair<const T> arrays, int64_t column,
                                          Complex<T>* to) {
  const int64_t h = grid.height, w = grid.width, ny = grid.y.length, nx = grid.x.length;
  const DisplacementLanes<T> lanes(grid, column);
  for (int64_t d = 1 - h; d < h; ++d) {
    const auto load_lanes = [&](const T* array) {
      T v[kLanes<T>] = {};
      if (array) {
        const T* zero = array + (d + h - 1) * (2 * w - 1) + w - 1;
        for (int64_t lane = 0; lane < lanes.right; ++lane) v[lane] = zero[column + lane];
        for (int64_t lane = lanes.left; lane < lanes.last; ++lane)
          v[lane] = zero[column + lane - nx];
      }
      return load(v, kLanes<T>);
    };
    const Complex<T> z{load_lanes(arrays.first), load_lanes(arrays.second)};
    const T sine = grid.twist[2 * std::abs(d) + 1];
    to[d < 0 ? d + ny : d] = times(z, grid.twist[2 * std::abs(d)], d < 0 ? sine : -sine);
  }
}

// From one band of a pair of real arrays' spectrum, (2, x.length), the conjugates of the spectrum
// of the first to `to` and of the second, if there are both, after it; `arrays` lie at each
// frequency.
template <class T>
ROBUSTKERN_CLONES void store_spectrum(int64_t length, const Complex<T>* band, int64_t arrays,
                                      T scale, bool both, Complex<T>* to) {
  for (int64_t k = 0; k < length; ++k, to += arrays) {
    const Complex<T> z = band[k];
    const Complex<T> mirrored = conjugate(band[length + (k ? length - k : 0)]);
    to[0] = conjugate(z + mirrored) * (scale / 2);
    if (both) to[1] = conjugate(times_minus_i(z - mirrored)) * (scale / 2);
  }
}

// sum over d of K[c, c', d] exp(i omega d) / (y.length x.length), for the frequencies of all bands:
// (bands, x.length, C, C). At the frequencies of the mirrors it is the conjugate.
template <class T>
Buffer<T> covariance_spectrum(const Grid<T>& grid, const T* covariance) {
  const int64_t arrays = grid.channels * grid.channels, pairs = (arrays + 1) / 2;
  const int64_t size = (2 * grid.height - 1) * (2 * grid.width - 1);
  const int64_t ny = grid.y.length, nx = grid.x.length, strips = strips_of<T>(nx);
  const T scale = T(1) / static_cast<T>(nx * ny);
  auto spectrum = make_buffer<T>(grid.bands * nx * arrays);
  const auto work = make_buffer<T>(pairs * nx * grid.row);

  torch::stable::parallel_for(0, pairs * strips, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = make_buffer<T>(3 * ny);
    const auto rows = buffer.get(), scratch = rows + ny;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / strips, column = task % strips * kLanes<T>;
      const T* first = covariance + 2 * pair * size;
      std::fill(rows + grid.height, rows + ny - grid.height + 1, Complex<T>{});
      load_displacements(grid, {first, 2 * pair + 1 < arrays ? first + size : nullptr}, column,
                         rows);
      transform<T, false, false>(grid.y, {rows, 1}, {rows, 1}, scratch);
      transpose_bands<true>(grid, rows, std::min(kLanes<T>, nx - column),
                            work.get() + (pair * nx + column) * grid.row);
    }
  });
  torch::stable::parallel_for(0, pairs * grid.bands, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = make_buffer<T>(4 * nx);
    const auto band = buffer.get(), scratch = band + 2 * nx;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / grid.bands, index = task % grid.bands;
      for (int64_t side = 0; side < 2; ++side) {
        Complex<T>* from = work.get() + pair * nx * grid.row + 2 * index + side;
        transform<T, false, false>(grid.x, {from, grid.row}, {band + side * nx, 1}, scratch);
      }
      store_spectrum(nx, band, arrays, scale, 2 * pair + 1 < arrays,
                     spectrum.get() + index * nx * arrays + 2 * pair);
    }
  });
  return spectrum;
}

}  // namespace
}  // namespace robustkern
