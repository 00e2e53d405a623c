// Kernels over the samples of tensors (N, *D): a total per sample, and maps that depend on it.
//
// What is computed is a task:
//   Combine                how terms become a total: Sum or LargerOrNan
//   term(sample, g)        of an element g, computed in g's type; not negative
//   factor(sample, total)  of a sample, in double
// and, where elements are mapped,
//   kReadsInputs           whether map looks at a second tensor
//   map(sample, factor, input, g)
//                          an element of the output, computed in g's type
#pragma once

#include <limits>
#include <type_traits>

#include "common/elements.cuh"
#include "common/groups.cuh"

namespace robustkern {

// Up to here a warp keeps enough loads in flight.
constexpr int64_t kWarpElements = 1024;
// What a block sums in float, a whole sample or a chunk of one.
constexpr int64_t kChunkElements = 16384;

// load(i), then use(i, what was loaded), for every kStep-th i: several loads are under way before
// the first is used.
template <int kStep, class Index, class Load, class Use>
__device__ void for_each_in_batches(Index i, Index end, Load load, Use use) {
  constexpr int kBatch = 4;
  for (; i < end; i += kBatch * kStep) {
    decltype(load(i)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * kStep < end) loaded[b] = load(i + b * kStep);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b * kStep < end) use(i + b * kStep, loaded[b]);
    }
  }
}

// The total of a sample over its group, whose block has the packs begin to end. Sums are taken in
// float where that is sure to lose nothing, neither to a square above the largest float nor to
// squares below the smallest.
template <class G, int kWidth, class T, class Task>
__device__ double total_of_packs(const Elements<T>& gradient, int64_t sample, int64_t begin,
                                 int64_t end, const Task& task) {
  using W = Wide<T>;
  using Combine = typename Task::Combine;
  const auto read = [&](int64_t i) { return gradient.template read<kWidth>(sample, i * kWidth); };
  const auto add = [&](auto total, const Pack<T, kWidth>& pack) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      total = Combine()(total, task.term(sample, decltype(total)(pack.values[k])));
    }
    return total;
  };

  W total = 0;
  for_each_in_batches<G::kLanes>(
      begin + G::lane(), end, read,
      [&](int64_t, const Pack<T, kWidth>& pack) { total = add(total, pack); });
  total = G::reduce(Combine(), total);
  constexpr bool kMayLose = std::is_same_v<W, float> && std::is_same_v<Combine, Sum>;
  constexpr float kSmallest = 1e-25f, kLargest = 1e38f;
  if (!kMayLose || (total > kSmallest && total < kLargest)) return total;

  double exact = 0;
#pragma unroll 1
  for (int64_t i = begin + G::lane(); i < end; i += G::kLanes) exact = add(exact, read(i));
  return G::reduce(Combine(), exact);
}

// One group for each chunk of each sample. The total of a whole sample becomes its factor.
template <class T, int kWidth, class G, class Task, class F>
__global__ void __launch_bounds__(G::kThreadsPerBlock)
    total_kernel(const __grid_constant__ Elements<T> gradient,  // (samples, packs)
                 const __grid_constant__ Task task, const int64_t samples, const int64_t packs,
                 const uint32_t chunks, const int64_t chunk_packs,
                 double* const totals,  // (samples, chunks), used where chunks are several
                 F* const factors)      // (samples), used where there is one
{
  const int64_t group = G::index();
  if (group >= samples * chunks) return;
  const int64_t sample = chunks > 1 ? blockIdx.x / chunks : group;  // a block is a group then
  const int64_t begin = (group - sample * chunks) * chunk_packs;
  const int64_t end = begin + chunk_packs < packs ? begin + chunk_packs : packs;
  const double total = total_of_packs<G, kWidth>(gradient, sample, begin, end, task);
  if (G::lane() != 0) return;
  if (chunks > 1) {
    totals[group] = total;
  } else {
    factors[sample] = static_cast<F>(task.factor(sample, total));
  }
}

template <class Task, class F>
__global__ void __launch_bounds__(kBlockThreads)
    factor_kernel(const __grid_constant__ Task task, const int64_t samples, const int64_t chunks,
                  const double* const totals,  // (samples, chunks)
                  F* const factors)            // (samples)
{
  const int64_t sample = thread_index();
  if (sample >= samples) return;
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    total = typename Task::Combine()(total, totals[sample * chunks + c]);
  }
  factors[sample] = static_cast<F>(task.factor(sample, total));
}

template <class T, int kWidth>
struct PackPair {
  Pack<T, kWidth> gradient, input;
};

template <class Task, int kWidth, class T>
__device__ PackPair<T, kWidth> read_pair(const Elements<T>& gradient, const Elements<T>& inputs,
                                         int64_t sample, int64_t pack) {
  PackPair<T, kWidth> pair;
  pair.gradient = gradient.template read<kWidth>(sample, pack * kWidth);
  if constexpr (Task::kReadsInputs) {
    pair.input = inputs.template read<kWidth>(sample, pack * kWidth);
  } else {
    pair.input = pair.gradient;
  }
  return pair;
}

// A sample's factor in W. One above the largest float belongs to elements so small that they can be
// lifted instead.
template <class W>
struct Scale {
  __device__ explicit Scale(double f) {
    constexpr double kLift = 0x1p64;
    const bool fits = fabs(f) <= std::numeric_limits<W>::max();
    factor = static_cast<W>(fits ? f : f / kLift);
    lift = static_cast<W>(fits ? 1 : kLift);
  }

  W factor, lift;
};

template <class Task, class T, int kWidth>
__device__ void map_pair(const Task& task, int64_t sample, const Scale<Wide<T>>& scale,
                         const PackPair<T, kWidth>& pair, T* to) {
  using W = Wide<T>;
  Pack<T, kWidth> output;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const W input(pair.input.values[k]), g(pair.gradient.values[k]);
    output.values[k] = static_cast<T>(task.map(sample, scale.factor, input, g * scale.lift));
  }
  *reinterpret_cast<Pack<T, kWidth>*>(to) = output;
}

// A sample's total and its map by one group, which finds the gradient in the caches when it comes
// back to it. Each block of a group keeps to one stretch of the sample.
template <class T, int kWidth, class G, class Task>
__global__ void __launch_bounds__(G::kThreadsPerBlock)
    total_and_map_kernel(const __grid_constant__ Elements<T> gradient,  // (samples, packs)
                         const __grid_constant__ Elements<T> inputs,    // (samples, packs)
                         const __grid_constant__ Task task, const int64_t samples,
                         const int64_t packs,
                         T* const output)  // (samples, packs)
{
  const int64_t sample = G::index();
  if (sample >= samples) return;
  const int64_t begin = packs * G::block() / G::kBlocks;
  const int64_t end = packs * (G::block() + 1) / G::kBlocks;
  const double total = total_of_packs<G, kWidth>(gradient, sample, begin, end, task);
  const Scale<Wide<T>> scale(task.factor(sample, total));
  T* const to = output + sample * packs * kWidth;
  for_each_in_batches<G::kLanes>(
      begin + G::lane(), end,
      [&](int64_t i) { return read_pair<Task, kWidth>(gradient, inputs, sample, i); },
      [&](int64_t i, const PackPair<T, kWidth>& pair) {
        map_pair(task, sample, scale, pair, to + i * kWidth);
      });
}

constexpr int kMapPacks = 4 * kBlockThreads;  // of a block

// How a grid of blocks covers the packs of all samples: a block has a part of one sample, or as
// many small samples as it can.
struct MapGrid {
  MapGrid(int64_t samples, int64_t packs)
      : samples(samples),
        packs(packs),
        blocks_per_sample(static_cast<uint32_t>((packs + kMapPacks - 1) / kMapPacks)),
        samples_per_block(packs && packs < kMapPacks ? static_cast<uint32_t>(kMapPacks / packs)
                                                     : 1) {}

  int64_t threads() const {
    return (samples + samples_per_block - 1) / samples_per_block * blocks_per_sample *
           kBlockThreads;
  }

  int64_t samples, packs;
  uint32_t blocks_per_sample, samples_per_block;
};

// The map alone.
template <class T, int kWidth, class Task>
__global__ void __launch_bounds__(kBlockThreads)
    map_kernel(const __grid_constant__ Elements<T> gradient,  // (samples, packs)
               const __grid_constant__ Elements<T> inputs,    // (samples, packs)
               const __grid_constant__ Task task, const MapGrid grid,
               const double* const factors,  // (samples); null where no total is needed
               T* const output)              // (samples, packs)
{
  const uint32_t row = blockIdx.x / grid.blocks_per_sample;
  const int64_t first_sample = static_cast<int64_t>(row) * grid.samples_per_block;
  const int64_t first_pack =
      static_cast<int64_t>(blockIdx.x - row * grid.blocks_per_sample) * kMapPacks;
  const int64_t samples_left = grid.samples - first_sample;
  const int64_t left = grid.samples_per_block < samples_left
                           ? grid.samples_per_block * grid.packs - first_pack
                           : samples_left * grid.packs - first_pack;
  const auto count = static_cast<uint32_t>(left < kMapPacks ? left : kMapPacks);
  const auto sample_packs = static_cast<uint32_t>(grid.packs);  // less than 2^32 where it matters
  const auto scale_of = [&](int64_t sample) {
    return Scale<Wide<T>>(factors ? factors[sample] : task.factor(sample, 0.0));
  };
  const auto first_scale = scale_of(first_sample);  // the only one where samples are large
  const auto sample_of = [&](uint32_t i) {
    return grid.samples_per_block > 1 ? i / sample_packs : 0;
  };
  for_each_in_batches<kBlockThreads>(
      threadIdx.x, count,
      [&](uint32_t i) {
        const uint32_t sample = sample_of(i);
        return read_pair<Task, kWidth>(gradient, inputs, first_sample + sample,
                                       first_pack + i - sample * sample_packs);
      },
      [&](uint32_t i, const PackPair<T, kWidth>& pair) {
        const int64_t sample = first_sample + sample_of(i);
        const auto scale = sample == first_sample ? first_scale : scale_of(sample);
        map_pair(task, sample, scale, pair,
                 output + (first_sample * grid.packs + first_pack + i) * kWidth);
      });
}

// factors[sample] = the task's factor of the sample's total, by one block for each chunk.
template <class F, class T, class Task>
void find_factors_by_blocks(const Launcher& launch, const Tensor& tensor,
                            const Elements<T>& gradient, const Task& task, F* factors) {
  const int64_t samples = sample_count(tensor), size = sample_size(tensor);
  const int64_t chunks = (size + kChunkElements - 1) / kChunkElements;
  const int64_t count = chunks > 1 ? samples * chunks : 0;
  Tensor buffer = torch::stable::new_empty(tensor, {&count, 1}, ScalarType::Double);
  auto* const totals = static_cast<double*>(buffer.mutable_data_ptr());
  dispatch_width<T>({&gradient}, [&](auto width) {
    launch(total_kernel<T, width, BlockGroup, Task, F>, samples * chunks * kBlockThreads, gradient,
           task, samples, size / width, static_cast<uint32_t>(chunks),
           (size / width + chunks - 1) / chunks, totals, factors);
  });
  if (chunks > 1) launch(factor_kernel<Task, F>, samples, task, samples, chunks, totals, factors);
}

template <class F, class T, class Task>
void find_factors(const Launcher& launch, const Tensor& tensor, const Elements<T>& gradient,
                  const Task& task, F* factors) {
  const int64_t samples = sample_count(tensor), size = sample_size(tensor);
  if (size > kWarpElements) {
    find_factors_by_blocks(launch, tensor, gradient, task, factors);
    return;
  }
  dispatch_width<T>({&gradient}, [&](auto width) {
    launch(total_kernel<T, width, WarpGroup, Task, F>, samples * kWarp, gradient, task, samples,
           size / width, 1u, size / width, nullptr, factors);
  });
}

// The task's map of a gradient and inputs read alongside, contiguous.
template <bool kNeedsTotals, class T, class Task>
Tensor map_samples(const Launcher& launch, Tensor gradient_tensor, Tensor inputs_tensor,
                   const Task& task) {
  const int64_t samples = sample_count(gradient_tensor), size = sample_size(gradient_tensor);
  Tensor output = torch::stable::new_empty(gradient_tensor, gradient_tensor.sizes());
  auto* const to = static_cast<T*>(output.mutable_data_ptr());
  const auto dims = ordered_dimensions(gradient_tensor, Order::kRowMajor);
  const auto gradient = elements_of<T>(gradient_tensor, dims);
  const auto inputs = elements_of<T>(inputs_tensor, dims);
  dispatch_width<T>({&gradient, &inputs}, [&](auto width) {
    constexpr int kWidth = width;
    const int64_t packs = size / kWidth;
    const MapGrid grid(samples, packs);
    if constexpr (!kNeedsTotals) {
      launch(map_kernel<T, kWidth, Task>, grid.threads(), gradient, inputs, task, grid, nullptr,
             to);
    } else if (size <= kWarpElements) {
      launch(total_and_map_kernel<T, kWidth, WarpGroup, Task>, samples * kWarp, gradient, inputs,
             task, samples, packs, to);
    } else if (size <= kChunkElements) {
      launch(total_and_map_kernel<T, kWidth, BlockGroup, Task>, samples * kBlockThreads, gradient,
             inputs, task, samples, packs, to);
    } else if (launch.is_filled_by_clusters(samples, ClusterGroup::kBlocks)) {
      launch.in_clusters(total_and_map_kernel<T, kWidth, ClusterGroup, Task>,
                         samples * ClusterGroup::kBlocks, ClusterGroup::kThreadsPerBlock,
                         ClusterGroup::kBlocks, gradient, inputs, task, samples, packs, to);
    } else {
      Tensor factors = torch::stable::new_empty(output, {&samples, 1}, ScalarType::Double);
      auto* const data = static_cast<double*>(factors.mutable_data_ptr());
      find_factors_by_blocks(launch, gradient_tensor, gradient, task, data);
      launch(map_kernel<T, kWidth, Task>, grid.threads(), gradient, inputs, task, grid, data, to);
    }
  });
  return output;
}

}  // namespace robustkern
