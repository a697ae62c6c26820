// What ptx_arithmetic.h says that PTX's instructions compute, against other ways to get there.
#include <cfenv>
#include <cmath>
#include <random>

#include "check.h"
#include "ptx_arithmetic.h"

using namespace ulmfit_fast::ptx;

std::mt19937 engine(7);

uint32_t any_bits() { return static_cast<uint32_t>(engine()); }
float any_float() {
  const float value = std::bit_cast<float>(any_bits());
  return std::isnormal(value) ? value : 1.5f;
}

void sums_are_rounded_down() {
  for (int i = 0; i < 100000; ++i) {
    const float a = any_float(), b = std::bit_cast<float>(0x3F800000 | any_bits() >> 9);
    const float c = std::ldexp(any_float() > 0 ? a : -a, static_cast<int>(any_bits() % 20) - 10);
    std::fesetround(FE_DOWNWARD);
    volatile float x = a, y = b, z = c;
    const volatile float expected = std::fma(x, y, z);
    std::fesetround(FE_TONEAREST);
    if (std::isnormal(expected)) CHECK(fma_rm_(a, b, c) == expected, "%a * %a + %a", a, b, c);
  }
}

// The result is the nearest of its neighbours to `v`, and of two the even one.
template <class To>
void check_nearest(float v) {
  const uint16_t bits = cvt_rn<To, float>(v).bits;
  const double there = std::abs(cvt<float>(To{bits}) - static_cast<double>(v));
  for (const int step : {-1, 1}) {
    const auto other = static_cast<uint16_t>(bits + step);
    const double distance = std::abs(cvt<float>(To{other}) - static_cast<double>(v));
    CHECK(!(distance < there) && (distance != there || bits % 2 == 0), "%a became %04x", v, bits);
  }
}

void conversions() {
  for (int i = 0; i < 100000; ++i) {
    const uint32_t halfway[] = {0xFFFFFFFF, 0xFFFF8000, 0xFFFFF000};  // anything; of bf16; of fp16
    const float v = std::bit_cast<float>(any_bits() & halfway[i % 3]);
    if (std::isnormal(v) && std::abs(v) < 1e38f) check_nearest<Brain>(v);
    if (std::abs(v) > 1e-4f && std::abs(v) < 6e4f) check_nearest<Half>(v);
  }
  CHECK((cvt_rna<Tf32, float>(std::bit_cast<float>(0x3F801000)).bits == 0x3F802000),
        "halves: away from zero");
  CHECK((cvt_rna<Tf32, float>(std::bit_cast<float>(0xBF800FFF)).bits == 0xBF800000), "less: to zero");
  CHECK((cvt_sat<float, float>(NAN) == 0 && cvt_sat<float, float>(7) == 1), "cvt.sat");
}

void integers() {
  CHECK(mul_hi_<int32_t>(-3, 1 << 30) == -1 && mul_hi_<uint32_t>(-3, 1 << 30) == 0x3FFFFFFF, "mul.hi");
  CHECK(mul_wide_<uint32_t>(-1, -1) == 0xFFFFFFFE00000001ull && mul_wide_<int32_t>(-1, 2) == -2, "mul.wide");
  CHECK(shl_<uint32_t>(1, 32) == 0 && shr_<uint32_t>(-1, 40) == 0 && shr_<int64_t>(-5, 70) == -1, "shifts");
  CHECK(bfi_<uint64_t>(0xAB, 0, 4, 4) == 0xB0 && bfi_<uint64_t>(0, ~0ull, 4, 60) == 0xF &&
            bfi_<uint64_t>(0, 5, 64, 1) == 5,
        "bfi");
  CHECK(put<uint32_t>(get<int16_t>(uint16_t{0x8000})) == 0xFFFF8000, "the sign is extended");
  CHECK(join(uint16_t{1}, uint16_t{2}) == 0x20001 && part<uint32_t>(uint64_t{5} << 32, 1) == 5, "halves");
  CHECK(!setp_ne_(NAN, 1.0f) && setp_geu_(NAN, 1.0f) && setp_ne_(1, 2), "comparisons with NaN");
}

int main() {
  sums_are_rounded_down();
  conversions();
  integers();
}
