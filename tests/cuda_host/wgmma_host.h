// Test-only: the instructions of csrc/cuda/wgmma.cuh for the CPU, as the PTX ISA has them. Copies and products run
// beside the threads, as late as they may: a copy when somebody waits for a barrier, a product when its group is waited
// for. So it shows when a thread reads what it did not wait for, or gives away what is still being read.
#pragma once
#include <deque>
#include <map>

#include "cuda_host.h"

namespace kdfast::cuda {

struct alignas(8) StageBarrier {
  uint8_t phase, arrivals, missing, shown;  // missing: arrivals of this phase; shown: to the copy engine
  int32_t bytes;                            // expected and not there yet
};

}  // namespace kdfast::cuda

namespace cuda_host {

using kdfast::cuda::StageBarrier;

// Where a block's shared memory seems to begin: no place for what is swizzled by its address.
constexpr uint32_t kSharedBegin = 128;
constexpr unsigned kGroup = 128;  // threads of a warpgroup

// What a matrix says of itself to the copy engine: the bytes of a TensorMap.
struct MappedRows {
  const unsigned char* start;
  int64_t rows, columns, step;  // in bytes from row to row
  int box_rows;
};

// 16-byte vectors of 128-byte rows change places with others of their row.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70u); }

// One operand of a product as numbers: [rows or columns of the product][16].
using Operand = std::vector<float>;
struct Product {
  uint64_t a, b;
  bool wide_a, wide_b;
  int columns;
  float* sums;
  Operand (*read)(Block&, uint64_t, bool, int);
};
struct Engines : Unfinished {
  struct Thread {
    bool begun = false;  // its sums are the tensor cores'
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    unsigned done = 0;
  };
  struct Operands {
    Operand a, b;
    uint64_t of_a, of_b;
    unsigned threads = 0;  // that have used them
  };
  std::deque<std::function<void()>> copies;
  std::vector<StageBarrier*> unshown;
  std::vector<Thread> threads;
  std::map<std::pair<unsigned, unsigned>, Operands> operands;  // by warpgroup and number of the product

  std::string complaint() const override {
    if (!copies.empty()) return "a copy that nobody waited for";
    auto waits = [](const Thread& t) { return !t.open.empty() || !t.groups.empty(); };
    return std::any_of(threads.begin(), threads.end(), waits) ? "products that nobody waited for" : "";
  }
};
inline Engines& engines() {
  Block& block = *machine().current().block;
  if (!block.unfinished) {
    const auto made = std::make_shared<Engines>();
    made->threads.resize(block.warps.size() * 32);
    block.unfinished = made;
  }
  return static_cast<Engines&>(*block.unfinished);
}
inline Engines::Thread& thread() { return engines().threads[threadIdx.x]; }

inline unsigned char* shared_at(Block& block, uint32_t address) {
  const int64_t at = int64_t(address) - kSharedBegin;
  if (at < 0 || at + 16 > int64_t(block.memory.size())) machine().fail("an operand or box beyond shared memory");
  return block.shared() + at;
}

inline void check_made(const StageBarrier* b) {
  if (b->phase > 1) machine().fail("a barrier that nobody made");
}
inline void end_phase(StageBarrier* b) {
  if (b->missing || b->bytes) return;
  b->phase ^= 1;
  b->missing = b->arrivals;
  machine().progress();
}

// The operand that a descriptor describes, with 128-byte swizzle: rows of 8 numbers (16 bytes) in groups of eight rows.
template <class T>
Operand read_operand(Block& block, uint64_t descriptor, bool wide, int count) {
  auto bits = [&](int first, int last) {
    return uint32_t(descriptor >> first & ((uint64_t(1) << (last - first + 1)) - 1));
  };
  const uint32_t start = bits(0, 13) << 4, leading = bits(16, 29) << 4, stride = bits(32, 45) << 4;
  if (bits(62, 63) != 1 || bits(49, 51) != 0) machine().fail("a descriptor of an operand that is not swizzled so");
  if (start >> 7 & 7) machine().fail("an operand off the 1024 bytes in which its swizzle repeats");
  Operand numbers(size_t(count) * 16);
  for (uint32_t i = 0; i < uint32_t(count); ++i) {
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t at =
          wide ? i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128 : i / 8 * stride + i % 8 * 128 + k * 2;
      const uint32_t address = swizzled(start + at);
      uint16_t number;
      std::memcpy(&number, shared_at(block, address & ~15u) + address % 16, 2);
      numbers[i * 16 + k] = kdfast::cuda::widen_bits<T>(number);
    }
  }
  return numbers;
}

// The calling thread's numbers of c [64, columns] += a b.
inline void run(const Product& p) {
  Engines& of = engines();
  Block& block = *machine().current().block;
  const unsigned group = threadIdx.x / kGroup;
  const auto key = std::pair{group, thread().done++};
  auto found = of.operands.find(key);
  if (found == of.operands.end()) {
    found =
        of.operands.insert({key, {p.read(block, p.a, p.wide_a, 64), p.read(block, p.b, p.wide_b, p.columns), p.a, p.b}})
            .first;
  }
  Engines::Operands& operands = found->second;
  if (operands.of_a != p.a || operands.of_b != p.b) machine().fail("a product whose warps do not agree");
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x % kGroup / 32;
  for (int i = 0; i < p.columns / 2; ++i) {
    const unsigned row = 16 * warp + 8 * (unsigned(i) / 2 % 2) + lane / 4;
    const unsigned column = 8 * (unsigned(i) / 4) + 2 * (lane % 4) + unsigned(i) % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) sum += operands.a[row * 16 + k] * operands.b[column * 16 + k];
    p.sums[i] += sum;
  }
  if (++operands.threads == kGroup) of.operands.erase(found);
}

}  // namespace cuda_host

namespace kdfast::cuda {

inline uint32_t shared_address(const void* p) {
  return uint32_t((const unsigned char*)p - shared_memory()) + cuda_host::kSharedBegin;
}

inline void barrier_make(StageBarrier* b, int arrivals) {
  check_aligned(b, 8);
  *b = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 0};
  cuda_host::engines().unshown.push_back(b);
}
inline void barriers_made() {
  auto& unshown = cuda_host::engines().unshown;
  for (StageBarrier* b : unshown) b->shown = 1;
  unshown.clear();
}
inline void barrier_arrive(StageBarrier* b) {
  cuda_host::check_made(b);
  if (b->missing == 0) cuda_host::machine().fail("more arrivals than a barrier was made for");
  --b->missing;
  cuda_host::end_phase(b);
}
inline void barrier_expect(StageBarrier* b, int bytes) {
  cuda_host::check_made(b);
  b->bytes += bytes;
  barrier_arrive(b);
}
inline void barrier_wait(StageBarrier* b, unsigned parity) {
  auto& machine = cuda_host::machine();
  cuda_host::check_made(b);
  while (b->phase == parity) {
    auto& copies = cuda_host::engines().copies;
    if (copies.empty()) {
      machine.yield();
    } else {
      copies.front()();
      copies.pop_front();
    }
  }
  machine.progress();
}

inline void copy_box(void* to, const TensorMap& map, StageBarrier* barrier, int column, int row) {
  auto& machine = cuda_host::machine();
  cuda_host::check_made(barrier);
  if (!barrier->shown) machine.fail("a copy to a barrier that the copy engine was not shown");
  const uint32_t address = shared_address(to);
  if (address % 128) machine.fail("a box to a misaligned address");
  cuda_host::MappedRows of;
  std::memcpy(&of, map.bytes, sizeof(of));
  cuda_host::Block& block = *machine.current().block;
  cuda_host::engines().copies.push_back([=, &block] {
    for (int r = 0; r < of.box_rows; ++r) {
      for (int i = 0; i < kBoxColumns; ++i) {
        const bool inside = row + r >= 0 && row + r < of.rows && column + i >= 0 && column + i < of.columns;
        uint16_t number = 0;
        if (inside) std::memcpy(&number, of.start + (row + r) * of.step + 2 * (column + i), 2);
        const uint32_t at = cuda_host::swizzled(address + uint32_t(128 * r + 2 * i));
        std::memcpy(cuda_host::shared_at(block, at & ~15u) + at % 16, &number, 2);
      }
    }
    barrier->bytes -= 128 * of.box_rows;
    if (barrier->bytes < 0) cuda_host::machine().fail("more bytes than a barrier expects");
    cuda_host::end_phase(barrier);
  });
}

template <int kCount>
void registers_down_to() {}
template <int kCount>
void registers_up_to() {}

inline void products_begin() { cuda_host::thread().begun = true; }
inline void products_commit() {
  auto& thread = cuda_host::thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kOpen>
void products_wait() {
  auto& thread = cuda_host::thread();
  for (; thread.groups.size() > kOpen; thread.groups.pop_front()) {
    for (const cuda_host::Product& p : thread.groups.front()) cuda_host::run(p);
  }
  thread.begun = false;
}
template <int kM, int kN>
void sums_arrived(float (&)[kM][kN]) {}

template <bool kWideA, bool kWideB, class T, size_t kSums>
void product(T, float (&c)[kSums], uint64_t a, uint64_t b) {
  auto& thread = cuda_host::thread();
  if (!thread.begun) cuda_host::machine().fail("a product whose sums are still the thread's");
  thread.open.push_back({a, b, kWideA, kWideB, int(2 * kSums), c, cuda_host::read_operand<T>});
}

}  // namespace kdfast::cuda
