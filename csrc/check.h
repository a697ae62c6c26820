// Checks of an op's tensors. Every message names the op
// and the argument, says what it was and what is allowed.
//
// The public Python functions check before they call; these hold for every other way in (torch.compile,
// torch.ops, libtorch), because a kernel that is handed a wrong shape or id would read outside its buffers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/views.h"

namespace ulmfit_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "ulmfit_fast." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define ULMFIT_CHECK(condition, op, ...)                    \
  do {                                                      \
    if (!(condition)) ::ulmfit_fast::fail(op, __VA_ARGS__); \
  } while (0)

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "torch's scalar type number " + std::to_string(static_cast<int>(type));
  }
}

// "(2, 3)"
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t n : sizes) text << separator << n, separator = ", ";
  text << (*separator == '(' ? "()" : ")");
  return text.str();
}

inline DType dtype_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(op, name, " must be float64, float32, bfloat16 or float16, got ", name_of(type));
  }
}
inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  return dtype_of(op, name, t.scalar_type());
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  ULMFIT_CHECK(t.scalar_type() == expected, op, name, " must be ", name_of(expected), ", got ",
               name_of(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  ULMFIT_CHECK(t.dim() == dim, op, name, " must have ", dim, " dimensions, got shape ",
               shape_text(t.sizes()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected.begin()[i];
  ULMFIT_CHECK(same, op, name, " must have shape ", shape_text(expected), ", got ", shape_text(sizes));
}

inline std::string device_text(const Tensor& t) {
  const auto device = t.device();
  if (device.type() == torch::headeronly::DeviceType::CPU) return "cpu";
  if (device.type() == torch::headeronly::DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
  return "device type number " + std::to_string(static_cast<int>(device.type()));
}
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  ULMFIT_CHECK(t.device() == first.device(), op, name, " must be on the same device as the other tensors, ",
               device_text(first), ", got ", device_text(t));
}

inline void check_probability(const char* op, const char* name, double p) {
  ULMFIT_CHECK(p >= 0 && p < 1, op, name, " must be in [0, 1), got ", p);
}

// low <= value < high, or value == also, for each of n values.
inline void check_range(const char* op, const char* name, const int64_t* values, int64_t n, int64_t low,
                        int64_t high, std::optional<int64_t> also = std::nullopt) {
  for (int64_t i = 0; i < n; ++i) {
    ULMFIT_CHECK((values[i] >= low && values[i] < high) || also == values[i], op, name, " must be in ", low,
                 "..", high - 1, also.has_value() ? " or " + std::to_string(*also) : "", ", got ", values[i],
                 " at position ", i);
  }
}

}  // namespace ulmfit_fast
