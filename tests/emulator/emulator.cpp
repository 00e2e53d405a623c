// Blocks of threads as fibers: see cuda_runtime.h beside this.

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr size_t kStackBytes = 128 << 10;

// Blocks that meet, by number of arrivals.
class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}

  void wait() {
    std::unique_lock lock(mutex_);
    const unsigned generation = generation_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
      condition_.notify_all();
    } else {
      condition_.wait(lock, [&] { return generation != generation_; });
    }
  }

 private:
  const unsigned count_;
  unsigned arrived_ = 0, generation_ = 0;
  std::mutex mutex_;
  std::condition_variable condition_;
};

struct Cluster {
  explicit Cluster(unsigned blocks) : barrier(blocks), anchors(blocks) {}
  Barrier barrier;
  std::vector<char*> anchors;  // the address of `anchor` in each block's thread
};

enum class Wait { kNone, kWarp, kBlock, kCluster };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNone;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> warp_values;
  unsigned index = 0;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  Cluster* cluster = nullptr;
  const std::function<void()>* body = nullptr;
};

thread_local Block* block = nullptr;
thread_local char anchor;

void run_fiber() {
  (*block->body)();
  block->running->done = true;
  swapcontext(&block->running->context, &block->scheduler);
}

void wait_for(Wait what) {
  block->running->wait = what;
  swapcontext(&block->running->context, &block->scheduler);
}

// Lets those fibers go on that have all reached the same barrier. A thread that has ended is not
// waited for within its warp or block, as on a device.
void release(size_t begin, size_t end, Wait what) {
  for (size_t i = begin; i < end; ++i) {
    if (!block->fibers[i].done && block->fibers[i].wait != what) return;
  }
  for (size_t i = begin; i < end; ++i) block->fibers[i].wait = Wait::kNone;
}

bool all(Wait what) {
  for (const Fiber& fiber : block->fibers) {
    if (fiber.done || fiber.wait != what) return false;
  }
  return true;
}

void run_block(Block& own) {
  block = &own;
  blockIdx = dim3(own.index);
  blockDim = dim3(static_cast<unsigned>(own.fibers.size()));
  if (own.cluster) {
    own.cluster->anchors[own.index % own.cluster->anchors.size()] = &anchor;
    own.cluster->barrier.wait();
  }
  bool alive = true;
  while (alive) {
    alive = false;
    bool moved = false;
    for (size_t t = 0; t < own.fibers.size(); ++t) {
      Fiber& fiber = own.fibers[t];
      if (fiber.done) continue;
      alive = true;
      if (fiber.wait != Wait::kNone) continue;
      own.running = &fiber;
      threadIdx = dim3(static_cast<unsigned>(t));
      swapcontext(&own.scheduler, &fiber.context);
      moved = true;
    }
    for (size_t w = 0; w < own.fibers.size(); w += 32) {
      release(w, std::min(w + 32, own.fibers.size()), Wait::kWarp);
    }
    release(0, own.fibers.size(), Wait::kBlock);
    if (own.cluster && all(Wait::kCluster)) {
      own.cluster->barrier.wait();
      for (Fiber& fiber : own.fibers) fiber.wait = Wait::kNone;
      moved = true;
    }
    bool free = !alive || moved;
    for (const Fiber& fiber : own.fibers) free = free || (!fiber.done && fiber.wait == Wait::kNone);
    if (!free) {
      std::fprintf(stderr, "emulated kernel: threads wait for different barriers\n");
      std::abort();
    }
  }
}

}  // namespace

thread_local dim3 threadIdx, blockIdx, blockDim;

void __syncthreads() { wait_for(Wait::kBlock); }
void emulated_warp_barrier() { wait_for(Wait::kWarp); }
void emulated_cluster_barrier() { wait_for(Wait::kCluster); }

void* emulated_warp_values() { return &block->warp_values[threadIdx.x / 32 * 32]; }

void* emulated_map_shared(void* own, int other) {
  return block->cluster->anchors[other] + (static_cast<char*>(own) - &anchor);
}

void emulated_launch(unsigned blocks, unsigned threads, unsigned cluster_blocks,
                     const std::function<void()>& body) {
  std::vector<Block> all(cluster_blocks);
  for (Block& one : all) {
    one.fibers.resize(threads);
    one.warp_values.resize(threads);
    one.body = &body;
    for (Fiber& fiber : one.fibers) fiber.stack.reset(new char[kStackBytes]);
  }
  for (unsigned first = 0; first < blocks; first += cluster_blocks) {
    Cluster cluster(cluster_blocks);
    for (unsigned b = 0; b < cluster_blocks; ++b) {
      all[b].cluster = cluster_blocks > 1 ? &cluster : nullptr;
      all[b].index = first + b;
      for (Fiber& fiber : all[b].fibers) {
        fiber.done = false;
        fiber.wait = Wait::kNone;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
        makecontext(&fiber.context, run_fiber, 0);
      }
    }
    if (cluster_blocks == 1) {
      run_block(all[0]);
      continue;
    }
    std::vector<std::thread> running;
    for (Block& one : all) running.emplace_back([&one] { run_block(one); });
    for (std::thread& thread : running) thread.join();
  }
}
