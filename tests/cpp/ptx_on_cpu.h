// What the PTX instructions of the CUDA kernels do, for the C++ that tools/ptx_to_cpp.py makes of them:
// memory, threads and the matrix units. The fibers of cuda_on_cpu.h are the threads. By the PTX manual alone:
// nothing is taken from the kernels' sources or from mma_on_cpu.h, so that a mistake there does not hide
// itself.
//
// Beyond the results it checks that addresses are aligned to the whole of what is loaded or stored, and that
// shared memory is within the block's. A copy that cp.async has started takes place where it is waited for,
// no sooner.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "ptx_arithmetic.h"

namespace ulmfit_fast::ptx {

using cuda::BlocksOnCpu;

// --- memory ------------------------------------------------------------------------------------------------

template <class T>
void check_aligned(uint64_t address) {
  if (address % sizeof(T) != 0)
    throw std::logic_error("an address that is not aligned: " + std::to_string(address % 16) + " for " +
                           std::to_string(sizeof(T)) + " bytes");
}
struct Global {
  uint64_t address;
  template <class T>
  T* at() const {
    check_aligned<T>(address);
    return reinterpret_cast<T*>(address);
  }
};
using Parameter = Global;

// A block's: its addresses begin at 0.
struct SharedMemory {
  char* data = BlocksOnCpu::current()->shared_memory();
  size_t bytes = BlocksOnCpu::current()->shared_bytes();
};
struct Shared {
  SharedMemory block;
  uint64_t address;
  template <class T>
  T* at() const {
    const uint32_t offset = static_cast<uint32_t>(address);
    check_aligned<T>(offset);
    if (offset + sizeof(T) > block.bytes)
      throw std::logic_error("beyond the block's shared memory: byte " + std::to_string(offset) + " of " +
                             std::to_string(block.bytes));
    return reinterpret_cast<T*>(block.data + offset);
  }
};

// An address in a cluster's memory: the block's rank + 1 above the address in the block's own.
constexpr int kRankBit = 24;
inline uint32_t mapa(uint32_t address, uint32_t rank) { return address | (rank + 1) << kRankBit; }
struct Cluster {
  uint64_t address;
  template <class T>
  const T* at() const {
    const SharedMemory own;
    const uint32_t offset = address & ((1 << kRankBit) - 1),
                   rank = static_cast<uint32_t>(address) >> kRankBit;
    return BlocksOnCpu::current()->in_cluster(Shared{own, offset}.at<T>(), rank - 1);
  }
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};
template <class T, int N, class Place>
std::array<T, N> load(Place place) {
  std::array<T, N> values;
  std::memcpy(&values, place.template at<Vector<T, N>>(), sizeof values);
  return values;
}
template <class T, int N, class Place>
void store(Place place, const T (&values)[N]) {
  std::memcpy(place.template at<Vector<T, N>>(), values, sizeof values);
}

// What a thread has seen and begun.
struct Copy {
  Shared to;
  uint64_t from;
};
struct Thread {
  const void* flag = nullptr;  // of its last load_acquire
  uint64_t count = 0;          // that it saw there
  int polls = 0;               // and saw again
  std::vector<Copy> copies;    // under way

  static Thread& current() {
    static thread_local std::vector<Thread> all;
    const unsigned fiber = BlocksOnCpu::current()->fiber();
    if (all.size() <= fiber) all.resize(fiber + 1);
    return all[fiber];
  }
};
inline void begin() { Thread::current() = {}; }

// A thread that polls lets others go on; after many polls it waits until the flag changes, so that a wait
// without an end is found.
template <class T>
T load_acquire(Global place) {
  constexpr int kPolls = 100;
  const T* flag = place.at<T>();
  Thread& me = Thread::current();
  me.polls = me.flag == flag && me.count == *flag ? me.polls + 1 : 0;
  me.flag = flag;
  me.count = *flag;
  if (me.polls > kPolls) {
    BlocksOnCpu::current()->wait_for(flag, *flag + 1);
  } else if (me.polls > 0) {
    BlocksOnCpu::current()->yield();
  }
  return *flag;
}
inline void cp_async(SharedMemory block, uint64_t to, uint64_t from, int bytes) {
  if (bytes != 4) throw std::logic_error("cp.async of other than 4 bytes");
  Thread::current().copies.push_back({Shared{block, to}, from});
}
inline void cp_async_wait_all() {
  for (const Copy& copy : Thread::current().copies)
    *copy.to.at<uint32_t>() = *Global{copy.from}.at<uint32_t>();
  Thread::current().copies.clear();
}

// --- threads -----------------------------------------------------------------------------------------------

inline void bar_sync_() { BlocksOnCpu::current()->wait(true); }
inline void bar_warp_sync_() { BlocksOnCpu::current()->wait(false); }
inline void barrier_cluster_arrive_release_() { BlocksOnCpu::current()->arrive_at_cluster(); }
inline void barrier_cluster_wait_acquire_() { BlocksOnCpu::current()->wait_for_cluster(); }
inline void trap_() { throw std::logic_error("trap"); }
inline void assertion_failed(uint64_t message) {
  throw std::runtime_error(reinterpret_cast<const char*>(message));
}
inline uint32_t shfl_sync_bfly(uint32_t value, uint64_t lane_mask, uint64_t clamp, uint64_t lanes) {
  if (clamp != 31 || static_cast<uint32_t>(lanes) != 0xFFFFFFFF)
    throw std::logic_error("shfl of a part of a warp");
  BlocksOnCpu& blocks = *BlocksOnCpu::current();
  blocks.hand_over(value);
  return blocks.of_lane<uint32_t>(blocks.lane() ^ static_cast<unsigned>(lane_mask));
}

// --- matrix units ------------------------------------------------------------------------------------------

// d = a b + c of 16 x K, K x 8 and 16 x 8 elements, of which a lane holds, by the manual's figures, with g =
// lane / 4 and t = lane % 4, and n elements in a register (K = 8 n):
//   a's register r: row g, or g + 8 where r is odd; columns n t, n t + 1, ..., and 4 n further where r >= 2
//   b's register r: column g; rows n t, ..., and 4 n further where r = 1
//   c's element i: row g, or g + 8 where i >= 2; column 2 t + i % 2
template <int n, class Element>
void multiply(const std::array<uint32_t*, 4>& d, const std::array<uint32_t, 4>& a,
              const std::array<uint32_t, 2>& b, Element&& element) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  Registers mine;
  std::copy(a.begin(), a.end(), mine.a);
  std::copy(b.begin(), b.end(), mine.b);
  BlocksOnCpu& blocks = *BlocksOnCpu::current();
  blocks.hand_over(mine);
  float rows[16][8 * n], columns[8][8 * n];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto other = blocks.of_lane<Registers>(lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (int e = 0; e < n; ++e) {
      for (int r = 0; r < 4; ++r)
        rows[g + 8 * (r & 1)][n * t + e + 4 * n * (r >> 1)] = element(other.a[r], e);
      for (int r = 0; r < 2; ++r) columns[g][n * t + e + 4 * n * r] = element(other.b[r], e);
    }
  }
  const unsigned g = blocks.lane() / 4, t = blocks.lane() % 4;
  for (int i = 0; i < 4; ++i) {
    float sum = std::bit_cast<float>(*d[i]);
    for (int k = 0; k < 8 * n; ++k) sum += rows[g + 8 * (i >> 1)][k] * columns[2 * t + i % 2][k];
    *d[i] = std::bit_cast<uint32_t>(sum);
  }
}
inline void mma_sync_m16n8k16_row_col_f32_bf16_bf16_f32(const std::array<uint32_t*, 4>& d,
                                                        const std::array<uint32_t, 4>& a,
                                                        const std::array<uint32_t, 2>& b) {
  multiply<2>(d, a, b, [](uint32_t word, int e) { return cvt<float>(Brain{part<uint16_t>(word, e)}); });
}
inline void mma_sync_m16n8k16_row_col_f32_f16_f16_f32(const std::array<uint32_t*, 4>& d,
                                                      const std::array<uint32_t, 4>& a,
                                                      const std::array<uint32_t, 2>& b) {
  multiply<2>(d, a, b, [](uint32_t word, int e) { return cvt<float>(Half{part<uint16_t>(word, e)}); });
}
inline void mma_sync_m16n8k8_row_col_f32_tf32_tf32_f32(const std::array<uint32_t*, 4>& d,
                                                       const std::array<uint32_t, 4>& a,
                                                       const std::array<uint32_t, 2>& b) {
  multiply<1>(d, a, b, [](uint32_t word, int) {
    if ((word & 0x1FFF) != 0 && (word & 0x7FFFFFFF) != 0x7FFFFFFF)
      throw std::logic_error("an operand of TF32 is not rounded: a card cuts its bits off");
    return std::bit_cast<float>(word);
  });
}

}  // namespace ulmfit_fast::ptx
