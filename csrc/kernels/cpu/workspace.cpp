#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ulmfit_fast {
namespace {

constexpr int64_t kHuge = 2 << 20;
constexpr int64_t kKeepFrom = 1 << 20;  // smaller blocks: malloc reuses them well

struct Header {  // before each block, in a cache line of its own
  int64_t bytes;
};
constexpr int64_t kHeader = 64;
// What a block for so many bytes is allocated in, and how much of it there is to use.
int64_t unit_of(int64_t bytes) { return bytes >= kHuge ? kHuge : kHeader; }
int64_t usable(int64_t bytes) {
  const int64_t unit = unit_of(bytes);
  return (bytes + kHeader + unit - 1) / unit * unit - kHeader;
}

// Blocks that wait for their next use. Small ones are taken many times in a call, large ones once: a shelf
// for each, or the large ones would push out the small ones, which cost more. The large ones' limit holds all
// that a step of 128 sequences of the ULMFiT model with 30,000 words takes.
struct Shelf {
  int64_t limit;  // bytes kept, at most
  Header* kept[24];
  int64_t bytes;
};
constexpr int64_t kLarge = 8 << 20;
Shelf shelves[] = {{64 << 20, {}, 0}, {960 << 20, {}, 0}};
Shelf& shelf_of(int64_t bytes) { return shelves[bytes >= kLarge]; }
// Only ever tried: where another thread holds it, or held it when the process forked, malloc serves.
std::mutex mutex;

Header* take_kept(int64_t bytes) {
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) return nullptr;
  Shelf& shelf = shelf_of(bytes);
  Header** best = nullptr;
  for (Header*& block : shelf.kept) {
    if (block == nullptr || block->bytes < bytes || block->bytes / 2 > bytes) continue;
    if (best == nullptr || block->bytes < (*best)->bytes) best = &block;
  }
  if (best == nullptr) return nullptr;
  shelf.bytes -= (*best)->bytes;
  return std::exchange(*best, nullptr);
}

// Keeps the block if there is room, where the smallest ones kept make room for a larger one.
bool keep(Header* block) {
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  Shelf& shelf = shelf_of(block->bytes);
  if (!lock.owns_lock() || block->bytes > shelf.limit) return false;
  int64_t larger = 0;  // bytes of those that stay in any case
  for (const Header* other : shelf.kept)
    if (other != nullptr && other->bytes >= block->bytes) larger += other->bytes;
  if (larger + block->bytes > shelf.limit) return false;
  for (;;) {
    Header **room = nullptr, **smallest = nullptr;
    for (Header*& other : shelf.kept) {
      if (other == nullptr) {
        room = &other;
      } else if (smallest == nullptr || other->bytes < (*smallest)->bytes) {
        smallest = &other;
      }
    }
    if (room != nullptr && shelf.bytes + block->bytes <= shelf.limit) {
      *room = block;
      shelf.bytes += block->bytes;
      return true;
    }
    if ((*smallest)->bytes >= block->bytes) return false;  // as many blocks as there are places
    shelf.bytes -= (*smallest)->bytes;
    std::free(std::exchange(*smallest, nullptr));
  }
}

}  // namespace

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* workspace_take(int64_t bytes) {
  const int64_t size = usable(bytes);
  Header* block = size >= kKeepFrom ? take_kept(size) : nullptr;
  if (block == nullptr) {
    void* memory = std::aligned_alloc(unit_of(bytes), kHeader + size);
    if (memory == nullptr) throw std::bad_alloc();
    if (unit_of(bytes) == kHuge) prefer_huge_pages(memory, kHeader + size);
    block = new (memory) Header{size};
  }
  return reinterpret_cast<char*>(block) + kHeader;
}

void workspace_give(void* data) noexcept {
  Header* block = reinterpret_cast<Header*>(static_cast<char*>(data) - kHeader);
  if (block->bytes < kKeepFrom || !keep(block)) std::free(block);
}

int64_t workspace_release() {
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) return 0;
  int64_t released = 0;
  for (Shelf& shelf : shelves) {
    released += std::exchange(shelf.bytes, 0);
    for (Header*& block : shelf.kept) std::free(std::exchange(block, nullptr));
  }
  return released;
}

}  // namespace ulmfit_fast
