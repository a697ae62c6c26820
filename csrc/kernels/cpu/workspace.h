// Scratch memory of the CPU kernels: big blocks are kept for the next call, because the system hands out and
// clears their pages anew each time, which costs several per cent of an LSTM step.
#pragma once
#include <cstdint>

namespace ulmfit_fast {

// At least `bytes` of uninitialised memory, 64-byte aligned, from any thread. Throws std::bad_alloc.
void* workspace_take(int64_t bytes);
void workspace_give(void* block) noexcept;
// Gives what is kept back to the system; the number of bytes, 0 also where another thread is taking or giving
// a block just then.
int64_t workspace_release();
// Asks for huge pages behind memory that was just allocated: 512 times fewer page faults at its first touch.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace ulmfit_fast
