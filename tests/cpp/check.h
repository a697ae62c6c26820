// What the C++ tests share: a check that says what failed, random numbers, threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/kernels.h"

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

template <class T>
std::vector<T> random_values(int64_t n, unsigned seed, double scale = 1.0) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(-scale, scale);
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(uniform(generator));
  return values;
}

// |a - b| <= tolerance * max(1, |b|): for values of order one.
inline bool close(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * std::fmax(1.0, std::abs(b));
}

// `threads` threads, each with its share of the items.
inline ulmfit_fast::Parallel threads(int n) {
  ulmfit_fast::Parallel parallel;
  parallel.threads = n;
  parallel.pool = reinterpret_cast<void*>(static_cast<intptr_t>(n));
  parallel.run = [](void* pool, int64_t items, void (*body)(void*, int64_t, int64_t), void* arg) {
    const int64_t count = reinterpret_cast<intptr_t>(pool);
    std::vector<std::thread> running;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t begin = items * t / count, end = items * (t + 1) / count;
      if (begin < end) running.emplace_back(body, arg, begin, end);
    }
    for (std::thread& thread : running) thread.join();
  };
  return parallel;
}

inline std::vector<const ulmfit_fast::Kernels*> every_isa() {
  std::vector<const ulmfit_fast::Kernels*> tables;
  std::istringstream names(ulmfit_fast::available_isas());
  for (std::string name; std::getline(names, name, ',');)
    tables.push_back(ulmfit_fast::kernels_for(name.c_str()));
  return tables;
}
