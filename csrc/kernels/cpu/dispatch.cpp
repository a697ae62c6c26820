// Picks the instruction set at run time.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ulmfit_fast {

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
const Kernels& amx_kernels();

namespace {

bool has_avx2() {
  unsigned eax, ebx, ecx = 0, edx;  // clang's builtin does not know f16c
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (ecx & bit_F16C) != 0;
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// AMX registers are 8 KB of state that Linux gives only to a process that asks.
bool has_amx() {
#if defined(ULMFIT_AMX_ON_CPU)  // the tests' tile registers in memory
  return has_avx512bf16();
#elif defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kAmxBf16) && (edx & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

namespace {

struct Isa {
  const char* name;
  bool (*available)();
  const Kernels& (*table)();
  // Whether to use it unasked. On Sapphire Rapids a layer takes 1.2 times as long with the bf16 dot product
  // as with FMA; AMD documents twice FMA's rate for it.
  bool preferred = true;
};
const Isa kIsas[] = {// newest first
#if defined(__x86_64__)
                     {"amx", has_amx, amx_kernels},
                     {"avx512bf16", has_avx512bf16, avx512bf16_kernels, __builtin_cpu_is("amd") != 0},
                     {"avx512", has_avx512, avx512_kernels},
                     {"avx2", has_avx2, avx2_kernels},
#endif
                     {"baseline", [] { return true; }, baseline_kernels}};

const Kernels& choose() {
  const char* wanted = std::getenv("ULMFIT_FAST_ISA");
  const bool forced = wanted != nullptr && *wanted != '\0';
  for (const Isa& isa : kIsas)
    if ((forced ? std::strcmp(isa.name, wanted) == 0 : isa.preferred) && isa.available()) return isa.table();
  throw std::runtime_error("ULMFIT_FAST_ISA is '" + std::string(wanted) +
                           "', but this machine can run: " + available_isas());
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels* kernels_for(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.available()) return &isa.table();
  return nullptr;
}

const char* available_isas() {
  static const std::string names = [] {
    std::string list;
    for (const Isa& isa : kIsas)
      if (isa.available()) list += (list.empty() ? "" : ",") + std::string(isa.name);
    return list;
  }();
  return names.c_str();
}

}  // namespace ulmfit_fast
