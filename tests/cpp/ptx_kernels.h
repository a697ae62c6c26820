// Where the CUDA ops run on the CPU by the PTX that nvcc makes of their kernels: which C++ is whose
// translation.
#pragma once
#include <dlfcn.h>

#include <map>
#include <stdexcept>
#include <string>

namespace ulmfit_fast::ptx {

struct Kernel {
  void (*run)(void** parameters);  // pointers to the arguments
  size_t shared_bytes;             // static; the dynamic ones follow
};
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)(void**), size_t shared_bytes) {
    kernels()[name] = {run, shared_bytes};
  }
};

// By its name, which both compilers make of the source in the same way.
inline const Kernel& translation_of(const void* kernel) {
  Dl_info symbol = {};
  if (dladdr(kernel, &symbol) == 0 || symbol.dli_sname == nullptr)
    throw std::logic_error("a kernel without a name");
  const auto found = kernels().find(symbol.dli_sname);
  if (found == kernels().end()) throw std::logic_error(std::string("no PTX of ") + symbol.dli_sname);
  return found->second;
}

}  // namespace ulmfit_fast::ptx
