// The plan of the persistent recurrence over sizes and cards: limits, coverage, and by a model of who waits
// for whom that no block can wait for ever and none reads what is not written, or overwrites what is still
// read.
#include <set>
#include <string>

#include "check.h"
#include "lstm_model.h"

using namespace ulmfit_fast;
using namespace ulmfit_fast::cuda;

namespace {

int pack_clusters(const LstmSplit&) { return 32; }
const DeviceLimits kCards[] = {{132, 232448, 90, true, pack_clusters},  // H200
                               {132, 232448, 90, true},                 // the same without clusters
                               {108, 166912, 80, true},                 // A100
                               {72, 101376, 86, true},                  // A10
                               {16, 232448, 90, true, [](const LstmSplit&) { return 3; }},  // a MIG slice
                               {3, 101376, 120, true}};
const Direction kDirections[] = {Direction::forward, Direction::backward};

void check_limits(const LstmSplit& s, const DeviceLimits& card) {
  CHECK(s.parts * s.ctas <= card.multiprocessors, "%d parts of %d CTAs", s.parts, s.ctas);
  CHECK(s.shared_memory() <= card.shared_memory, "%ld bytes", static_cast<long>(s.shared_memory()));
  CHECK(s.direction == Direction::forward || s.ctas % kGroup == 0, "%d CTAs are no groups", s.ctas);
  CHECK(!s.clusters || (s.direction == Direction::backward && card.clusters), "no clusters here");
  CHECK(!s.clusters || s.parts * s.groups() <= card.clusters(s), "%d clusters", s.parts * s.groups());
  CHECK(s.padded_rows() - s.part_rows() < s.B && s.B <= s.padded_rows(), "a part without rows");
}

// Every (row, unit) has one item, of one pass of one CTA.
void check_items(const LstmSplit& s) {
  std::vector<int> times(s.B * s.H);
  for (int part = 0; part < s.parts; ++part)
    for (int cta = 0; cta < s.ctas; ++cta)
      for (int pass = 0; pass < s.passes; ++pass)
        for (int item = 0; item < s.items(); ++item)
          for (int u = 0; u < 2; ++u) {
            const int64_t row = part * s.part_rows() + pass * s.block_rows() + s.item_row(item);
            const int64_t unit = cta * s.cta_units() + s.item_unit(item) + u;
            if (row < s.B && unit < s.H) ++times[row * s.H + unit];
          }
  for (const int n : times)
    CHECK(n == 1, "H %ld, B %ld: a cell is computed %d times", (long)s.H, (long)s.B, n);
}

// A part holds every weight once: which rows of W_hh, or on the way back which (gate, unit), and all of K.
void check_weights(const LstmSplit& s) {
  std::vector<int> times(4 * s.H);
  for (int cta = 0; cta < s.ctas; ++cta)
    for (int n = 0; n < s.columns(); ++n) {
      const bool forward = s.direction == Direction::forward;
      const int64_t unit = forward ? cta * s.cta_units() + n / 4 : s.group_unit(cta, n);
      if (unit < s.H) ++times[forward ? s.weight_row(cta, n) : cta % kGroup * s.H + unit];
    }
  for (const int n : times) CHECK(n == 1, "H %ld: a row of weights is held %d times", (long)s.H, n);
  CHECK(s.first_chunk(0) == 0 && s.first_chunk(kSplitWarps) == s.chunks(), "K is not covered");
  int chunks[4] = {};  // of each scheduler of a multiprocessor
  for (int w = 0; w < kSplitWarps; ++w) chunks[w % 4] += s.first_chunk(w + 1) - s.first_chunk(w);
  const auto [least, most] = std::minmax_element(chunks, chunks + 4);
  CHECK(*most - *least <= 1, "%d chunks for one scheduler, %d for another", *most, *least);
}

void check_refusals() {
  const DeviceLimits h200 = kCards[0];
  const auto why = [](int64_t B, int64_t H, DType dtype, const DeviceLimits& card) {
    const LstmPlan plan = plan_lstm(B, H, dtype, /*tf32=*/false, Direction::forward, card);
    CHECK(!plan.fits() && !plan.why_not.empty(), "H %ld fits", static_cast<long>(H));
    return plan.why_not;
  };
  CHECK(why(64, 1152, DType::f64, h200).find("bfloat16") != std::string::npos, "dtype");
  CHECK(why(64, 1152, DType::f32, h200).find("float32 needs TF32") != std::string::npos, "TF32");
  CHECK(why(64, 1152, DType::bf16, {132, 232448, 75, true}).find("8.0") != std::string::npos, "capability");
  const DeviceLimits older{132, 232448, 90, true, {}, 75};
  CHECK(why(64, 1152, DType::bf16, older).find("compiled for compute capability 7.5") != std::string::npos,
        "PTX of an older card");
  CHECK(why(64, 1152, DType::bf16, {132, 232448, 90, false}).find("cooperatively") != std::string::npos,
        "launch");
  CHECK(why(64, 2048, DType::bf16, h200).find("132 multiprocessors with 227 KB") != std::string::npos,
        "size");
  for (const int64_t H : {int64_t{1} << 20, int64_t{0}, int64_t{-16}})
    CHECK(why(64, H, DType::bf16, h200).find("any card") != std::string::npos, "H = %ld",
          static_cast<long>(H));
}

// All plans of a card: limits, coverage, and the model where it has not run on such a plan; how many fit.
int check_plans(const DeviceLimits& card, DType dtype, Direction direction) {
  static std::set<std::vector<int>> seen;
  int fitting = 0;
  for (int64_t H = 1; H <= 2048; H += H < 140 ? 1 : H % 16 == 0 ? 15 : 1)
    for (const int64_t B : {1, 2, 7, 15, 16, 17, 32, 33, 48, 63, 64, 65, 100, 128, 200, 255, 256}) {
      const LstmPlan plan = plan_lstm(B, H, dtype, /*tf32=*/true, direction, card);
      if (!plan.fits()) continue;
      const LstmSplit& s = plan.split;
      ++fitting;
      check_limits(s, card);
      if (B < 33 || B == 256) check_weights(s);
      if (H < 140 || (H % 48 == 0 && B % 64 < 2)) check_items(s);
      // the model knows nothing of H and B but these
      const bool small = s.ctas <= 20 || seen.size() % 128 == 0;  // the large ones take their time
      const bool fresh = seen.insert({s.clusters, s.ctas, s.column_tiles, s.chunks(), s.chunk(), s.passes,
                                      static_cast<int>(direction)})
                             .second;
      if (!fresh || !small) continue;
      const std::string fault = LstmModel(s, 4).run();
      CHECK(fault.empty(), "H %ld, B %ld: %s", static_cast<long>(H), static_cast<long>(B), fault.c_str());
    }
  return fitting;
}

// Clusters are taken where they fit: enough of them at once, and the sums beside the rest in shared memory.
void check_clusters() {
  const auto clusters = [](int64_t shared_memory, int at_once, int64_t B = 64, int capability = 90,
                           int compiled = 90) {
    const auto count = [=](const LstmSplit&) { return at_once; };
    const DeviceLimits card{132, shared_memory, capability, true, count, compiled};
    const LstmPlan plan = plan_lstm(B, 1152, DType::bf16, false, Direction::backward, card);
    CHECK(plan.fits(), "%s", plan.why_not.c_str());
    return plan.split.clusters;
  };
  CHECK(clusters(232448, 32) && !clusters(232448, 31) && !clusters(232448, 0), "H = 1152 is 32 clusters");
  CHECK(!clusters(232448, 33, 64, 80), "clusters on an A100");
  CHECK(!clusters(232448, 33, 64, 90, 80), "clusters of kernels made from an A100's PTX");
  CHECK(!clusters(232448, 32, 256), "the sums of 4 row blocks are too large for shared memory");
}

// A model that finds nothing has to be one that could.
void check_mistakes() {
  for (const int64_t B : {16, 64, 100}) {
    const DeviceLimits l2{4, 232448, 90, true}, clusters{4, 232448, 90, true, pack_clusters};
    const LstmSplit in_l2 = plan_lstm(B, 50, DType::bf16, false, Direction::backward, l2).split,
                    in_cluster = plan_lstm(B, 50, DType::bf16, false, Direction::backward, clusters).split;
    CHECK(in_cluster.clusters && !in_l2.clusters, "the exchange of the sums");
    const auto finds = [](const LstmSplit& s, Mistake mistake, const char* words) {
      const std::string fault = LstmModel(s, 4, mistake).run();
      CHECK(fault.find(words) != std::string::npos, "mistake %d: '%s'", static_cast<int>(mistake),
            fault.c_str());
    };
    for (const LstmSplit& s : {in_l2, in_cluster}) {
      CHECK(LstmModel(s, 4).run().empty(), "%s", LstmModel(s, 4).run().c_str());
      finds(s, Mistake::sums_unawaited, "sums0");
      finds(s, Mistake::products_unordered, "reads before it is surely written product");
    }
    if (in_l2.passes > 1) finds(in_l2, Mistake::sums_awaited_early, "reads");
    finds(in_cluster, Mistake::arrival_too_early, "reads before it is surely written sums0");
    finds(in_cluster, Mistake::no_last_barrier, "sums0");
  }
}

void check_fits(int64_t H, int64_t B, DType dtype, const DeviceLimits& card) {
  for (const Direction direction : kDirections)
    CHECK(plan_lstm(B, H, dtype, /*tf32=*/true, direction, card).fits(), "H %ld, B %ld, dtype %d",
          static_cast<long>(H), static_cast<long>(B), static_cast<int>(dtype));
}

}  // namespace

int main() {
  check_refusals();
  check_clusters();
  check_mistakes();
  int fitting = 0;
  for (const DeviceLimits& card : kCards)
    for (const DType dtype : {DType::bf16, DType::f32})
      for (const Direction direction : kDirections) fitting += check_plans(card, dtype, direction);
  for (const auto& [H, B] : {std::pair<int, int>{400, 64}, {1152, 64}, {1150, 70}, {1152, 256}, {768, 16}})
    for (const DType dtype : {DType::bf16, DType::f32}) check_fits(H, B, dtype, kCards[0]);
  check_fits(1152, 64, DType::f16, kCards[2]);  // an A100 holds it too
  const LstmSplit even = plan_lstm(64, 1024, DType::bf16, false, Direction::forward, kCards[0]).split;
  CHECK(even.items() == kSplitThreads, "%d items, where one for each thread is as good", even.items());
  std::printf("%d plans\n", fitting);
}
