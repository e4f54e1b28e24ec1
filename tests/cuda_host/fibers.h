// Test-only: CUDA threads as fibers of one CPU thread. A cluster runs at a time; each of its threads runs until it
// waits (barrier, shuffle, push) and then hands over to the next, in order or shuffled. Memory is stronger ordered than
// on a GPU and copies are immediate: this finds wrong indices, missing barriers, deadlocks and reads of what nobody
// wrote, not missing fences.
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the running fiber, set at every switch

namespace cuda_host {

// Saves the callee-saved registers on the old stack and loads them from the new one.
extern "C" void cuda_host_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.weak cuda_host_switch
.hidden cuda_host_switch
cuda_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#else
#error "the CUDA host shim switches fibers on x86-64 only"
#endif

constexpr int kSavedRegisters = 6;
constexpr size_t kStack = 64 << 10, kGuard = 256;
constexpr int64_t kMostShared = 227 << 10;  // of a block
constexpr int kMostCluster = 16;
constexpr int kWarpWords = 6;            // of a lane in a matrix instruction
constexpr unsigned char kPoison = 0xff;  // memory that nobody wrote reads as NaN

// A barrier among the fibers that have not returned.
struct Meeting {
  int waiting = 0, members = 0;
  unsigned turn = 0;
  void release() {
    if (members == 0 || waiting != members) return;
    waiting = 0;
    ++turn;
  }
  void leave() {
    --members;
    release();
  }
};
struct Warp {
  Meeting meeting;
  // Two sets, used in turn: one meeting per shuffle or matrix instruction is enough.
  float slots[2][32];
  uint32_t words[2][32][kWarpWords];
};
// What a block's copies and products have yet to do, where these run beside its threads (wgmma_host.h).
struct Unfinished {
  virtual ~Unfinished() = default;
  virtual std::string complaint() const = 0;  // once all threads have returned; empty: none
};
struct Block {
  std::vector<unsigned char> memory;
  std::shared_ptr<Unfinished> unfinished;
  std::vector<Warp> warps;
  Meeting meeting;
  unsigned rank = 0, index = 0;
  // As aligned as a GPU's shared memory is promised to be.
  unsigned char* shared() { return (unsigned char*)((uintptr_t(memory.data()) + 127) & ~uintptr_t(127)); }
};
struct Fiber {
  void* stack_pointer;
  Block* block;
  unsigned thread, shuffles;
};

class Machine {
 public:
  // 0: threads take turns in order. 1: block by block, the next only when all of this one wait: a block that runs ahead
  // of its cluster. Else: in an order drawn from it.
  unsigned seed = 0;

  Fiber& current() { return fibers_[ring_[at_]]; }
  Block& peer(int rank) { return blocks_.at(size_t(rank)); }
  Meeting cluster;

  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    void* abandoned;
    cuda_host_switch(&abandoned, home_);
    __builtin_unreachable();
  }
  // Something happened that another fiber may be waiting for.
  void progress() { idle_ = 0; }
  void yield() {
    Fiber& before = current();
    do {
      at_ = (at_ + 1) % ring_.size();
    } while (seed == 1 && idle_ < 2 * before.block->warps.size() * 32 && current().block != before.block);
    if (++idle_ > 4 * ring_.size() + 64) fail("deadlock: a barrier, shuffle or push that not all threads reach");
    Fiber& next = current();
    if (&next == &before) return;
    enter();
    cuda_host_switch(&before.stack_pointer, next.stack_pointer);
  }
  void meet(Meeting& meeting) {
    const unsigned turn = meeting.turn;
    ++meeting.waiting;
    meeting.release();
    progress();
    while (meeting.turn == turn) yield();
    progress();
  }

  void run_cluster(unsigned first, int blocks, int threads, size_t shared, const std::function<void()>& body) {
    body_ = &body;
    fibers_.clear();
    ring_.clear();
    blocks_.assign(size_t(blocks), {});
    fibers_.reserve(size_t(blocks) * threads);
    cluster = {};
    cluster.members = blocks * threads;
    for (int b = 0; b < blocks; ++b) add_block(b, first, threads, shared);
    std::mt19937 random(seed);
    if (seed > 1) std::shuffle(ring_.begin(), ring_.end(), random);
    at_ = idle_ = 0;
    error_.clear();
    enter();
    cuda_host_switch(&home_, current().stack_pointer);
    for (Block& block : blocks_) {
      const unsigned char* end = block.shared() + shared;
      if (std::any_of(end, end + kGuard, [](unsigned char c) { return c != kPoison; })) {
        error_ = "a write beyond the shared memory that was asked for";
      }
      if (error_.empty() && block.unfinished) error_ = block.unfinished->complaint();
    }
    blocks_.clear();  // not at the process's end, where what they refer to may be gone
    if (!error_.empty()) throw std::runtime_error("cuda host shim: " + error_);
  }

 private:
  void add_block(int rank, unsigned first, int threads, size_t shared) {
    Block& block = blocks_[size_t(rank)];
    block.memory.assign(shared + 128 + kGuard, kPoison);
    block.warps.resize(size_t(threads + 31) / 32);
    block.meeting.members = threads;
    block.rank = unsigned(rank);
    block.index = first + unsigned(rank);
    for (int t = 0; t < threads; ++t) {
      ++block.warps[size_t(t) / 32].meeting.members;
      ring_.push_back(fibers_.size());
      fibers_.push_back({new_stack(fibers_.size()), &block, unsigned(t), 0});
    }
  }
  void* new_stack(size_t index) {
    if (index == stacks_.size()) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back((char*)memory);
    }
    void** top = (void**)(stacks_[index] + kStack) - 2;
    *--top = nullptr;  // the stack is 8 bytes off a multiple of 16 where a function starts
    *--top = (void*)+[] { machine().run_fiber(); };
    top -= kSavedRegisters;
    std::memset(top, 0, kSavedRegisters * sizeof(void*));
    return top;
  }
  [[noreturn]] void run_fiber() {
    (*body_)();
    Fiber& done = current();
    done.block->warps[done.thread / 32].meeting.leave();
    done.block->meeting.leave();
    cluster.leave();
    ring_.erase(ring_.begin() + long(at_));
    progress();
    void* finished;
    if (ring_.empty()) {
      cuda_host_switch(&finished, home_);
    } else {
      at_ %= ring_.size();
      enter();
      cuda_host_switch(&finished, current().stack_pointer);
    }
    __builtin_unreachable();
  }
  void enter() {
    threadIdx.x = current().thread;
    blockIdx.x = current().block->index;
  }

  std::vector<char*> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> ring_;  // fibers that have not returned, in the order of their turns
  std::vector<Block> blocks_;
  const std::function<void()>* body_ = nullptr;
  size_t at_ = 0, idle_ = 0;
  void* home_ = nullptr;
  std::string error_;

 public:
  static Machine& machine() {
    static Machine only;
    return only;
  }
};
inline Machine& machine() { return Machine::machine(); }

}  // namespace cuda_host
