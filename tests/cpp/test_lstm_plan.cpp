// The plan of the persistent recurrence over sizes and cards: limits, coverage, and by a model of who waits
// for whom that no block can wait for ever and none reads what is not written, or overwrites what is still
// read.
#include <map>
#include <set>
#include <string>

#include "check.h"
#include "kernels/cuda/lstm_plan.h"

using namespace ulmfit_fast;
using namespace ulmfit_fast::cuda;

namespace {

const DeviceLimits kCards[] = {{132, 232448, 90, true},  // H200
                               {108, 166912, 80, true},  // A100
                               {72, 101376, 86, true},   // A10
                               {16, 232448, 90, true},   // an eighth of an H200 (MIG)
                               {3, 101376, 120, true}};
const Direction kDirections[] = {Direction::forward, Direction::backward};

void check_limits(const LstmSplit& s, const DeviceLimits& card) {
  CHECK(s.parts * s.ctas <= card.multiprocessors, "%d parts of %d CTAs", s.parts, s.ctas);
  CHECK(s.shared_memory() <= card.shared_memory, "%ld bytes", static_cast<long>(s.shared_memory()));
  CHECK(s.direction == Direction::forward || s.ctas % kGroup == 0, "%d CTAs are no groups", s.ctas);
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
  CHECK(s.first_chunk(0) == 0 && s.first_chunk(kSplitWarps) * s.chunk() >= s.H, "K is not covered");
}

// What a part's warps do to memory and in which order, as vector clocks: a wait for a flag is the only thing
// that orders two blocks. The order that follows holds in every run, so one run decides about all.
class Model {
 public:
  Model(const LstmSplit& s, int T) : s(s), T(T) {
    const int warps = s.ctas * kSplitWarps;
    clock.assign(warps, std::vector<int>(warps));
    at.assign(s.ctas, 0);
    program();
  }

  // Runs every block as far as it can, again and again; a wait that nobody ends is a deadlock.
  void run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int cta = s.ctas - 1; cta >= 0; --cta)
        while (at[cta] < static_cast<int>(steps[cta].size()) && take(cta, steps[cta][at[cta]]))
          ++at[cta], moved = true;
    }
    for (int cta = 0; cta < s.ctas; ++cta)
      CHECK(at[cta] == static_cast<int>(steps[cta].size()), "block %d waits for ever at %d", cta, at[cta]);
  }

 private:
  enum Kind { wait, sync, read, write, publish };
  struct Step {
    Kind kind;
    int warp;  // that waits or reads; writes and flags come after a barrier: warp 0 stands for the block
    std::string what;  // a flag or a piece of a buffer, without its owner
    int first, end;    // blocks whose piece or flag it is
    int value;         // of the flag, or which version of the piece
  };
  struct Piece {
    int version = -1;
    std::vector<int> writer;  // its clock
    std::vector<std::pair<int, int>> readers;
  };
  using Clock = std::vector<int>;

  int id(int cta, int warp) const { return cta * kSplitWarps + warp; }
  void add(int cta, Step step) { steps[cta].push_back(std::move(step)); }
  void add_sync(int cta) { add(cta, {sync, 0, "", 0, 0, 0}); }

  // The kernels' order of waits, reads, barriers, writes and flags (lstm_persistent*.cu).
  void program() {
    steps.resize(s.ctas);
    for (int cta = 0; cta < s.ctas; ++cta) s.direction == Direction::forward ? forward(cta) : backward(cta);
  }
  std::string buffer(const char* name, int number, int pass) const {
    return name + std::to_string(number) + "/" + std::to_string(pass);
  }
  void read_sources(int cta, const char* flags, const std::string& what, int count, int version) {
    for (int w = 0; w < kSplitWarps; ++w) {
      add(cta, {wait, w, flags, s.first_source(w), s.end_source(w), count});
      add(cta, {read, w, what, s.first_source(w), s.end_source(w), version});
    }
    add_sync(cta);
  }
  void write_and_publish(int cta, const std::string& what, int version, const char* flags, int count) {
    add(cta, {write, 0, what, cta, cta + 1, version});
    add_sync(cta);
    add(cta, {publish, 0, flags, cta, cta + 1, count});
  }
  void forward(int cta) {
    for (int pass = 0; pass < s.passes; ++pass) add(cta, {write, 0, buffer("h", 0, pass), cta, cta + 1, 0});
    add_sync(cta);
    add(cta, {publish, 0, "h", cta, cta + 1, s.passes});
    for (int i = 0; i < T; ++i)
      for (int pass = 0; pass < s.passes; ++pass) {
        const int published = i * s.passes + pass + 1;
        read_sources(cta, "h", buffer("h", i % 2, pass), published, i);
        write_and_publish(cta, buffer("h", (i + 1) % 2, pass), i + 1, "h", published + s.passes);
      }
  }
  void backward(int cta) {
    const int group = cta / kGroup * kGroup;
    const auto read_sums = [&](int done, int pass, int version) {
      for (int w = 0; w < kSplitWarps; ++w) {
        add(cta, {wait, w, "sums", group, group + kGroup, done + pass + 1});
        if (cta * s.cta_units() < padded_units(s.H))
          add(cta, {read, w, buffer("sums", 0, pass), group, group + kGroup, version});
      }
    };
    for (int i = T - 1; i >= 0; --i) {
      const int done = (T - 1 - i) * s.passes;
      for (int pass = 0; pass < s.passes; ++pass) {
        if (i < T - 1) read_sums(done - s.passes, pass, i + 1);
        write_and_publish(cta, buffer("dgates", i % 2, pass), i, "dgates", done + pass + 1);
      }
      for (int pass = 0; pass < s.passes; ++pass) {
        read_sources(cta, "dgates", buffer("dgates", i % 2, pass), done + pass + 1, i);
        write_and_publish(cta, buffer("sums", 0, pass), i, "sums", done + pass + 1);
      }
    }
    for (int pass = 0; pass < s.passes; ++pass) read_sums((T - 1) * s.passes, pass, 0);
  }

  static void join(Clock& to, const Clock& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  bool take(int cta, const Step& step) {
    const int me = id(cta, step.warp);
    if (step.kind == wait) {
      for (int c = step.first; c < step.end; ++c)
        if (flags[step.what + "@" + std::to_string(c)].first < step.value) return false;
      // what the flag's value that it waits for says is known; a later value may not have been there yet
      for (int c = step.first; c < step.end; ++c)
        join(clock[me], history[step.what + "@" + std::to_string(c)].lower_bound(step.value)->second);
      return true;
    }
    if (step.kind == sync) {
      Clock all = clock[id(cta, 0)];
      for (int w = 1; w < kSplitWarps; ++w) join(all, clock[id(cta, w)]);
      for (int w = 0; w < kSplitWarps; ++w) clock[id(cta, w)] = all;
      return true;
    }
    ++clock[me][me];
    for (int c = step.first; c < step.end; ++c) {
      const std::string key = step.what + "@" + std::to_string(c);
      if (step.kind == publish) {
        flags[key] = {step.value, 0};
        history[key][step.value] = clock[me];
        continue;
      }
      Piece& piece = pieces[key];
      if (step.kind == read) {
        CHECK(piece.version == step.value, "block %d reads version %d of %s, not %d", cta, piece.version,
              key.c_str(), step.value);
        for (size_t i = 0; i < piece.writer.size(); ++i)
          CHECK(piece.writer[i] <= clock[me][i], "block %d reads %s before it is surely written", cta,
                key.c_str());
        piece.readers.push_back({me, clock[me][me]});
      } else {
        for (const auto& [reader, time] : piece.readers)
          CHECK(time <= clock[me][reader], "block %d overwrites %s, which may still be read", cta,
                key.c_str());
        piece.version = step.value, piece.writer = clock[me], piece.readers.clear();
      }
    }
    return true;
  }

  const LstmSplit& s;
  int T;
  std::vector<std::vector<Step>> steps;  // of each block
  std::vector<int> at;
  std::vector<Clock> clock;  // of each warp
  std::map<std::string, std::pair<int, int>> flags;
  std::map<std::string, std::map<int, Clock>> history;  // of a flag: what each value says
  std::map<std::string, Piece> pieces;
};

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
  CHECK(why(64, 1152, DType::bf16, {132, 232448, 90, false}).find("cooperatively") != std::string::npos,
        "launch");
  CHECK(why(64, 2048, DType::bf16, h200).find("132 multiprocessors with 227 KB") != std::string::npos,
        "size");
  CHECK(why(64, 1 << 20, DType::bf16, h200).find("any card") != std::string::npos, "huge");
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
      const bool small = s.ctas <= 20 || seen.size() % 64 == 0;  // the large ones take their time
      const bool fresh =
          seen.insert({s.ctas, s.column_tiles, s.chunks(), s.chunk(), s.passes, static_cast<int>(direction)})
              .second;
      if (fresh && small) Model(s, 4).run();
    }
  return fitting;
}

void check_fits(int64_t H, int64_t B, DType dtype, const DeviceLimits& card) {
  for (const Direction direction : kDirections)
    CHECK(plan_lstm(B, H, dtype, /*tf32=*/true, direction, card).fits(), "H %ld, B %ld, dtype %d",
          static_cast<long>(H), static_cast<long>(B), static_cast<int>(dtype));
}

}  // namespace

int main() {
  check_refusals();
  int fitting = 0;
  for (const DeviceLimits& card : kCards)
    for (const DType dtype : {DType::bf16, DType::f32})
      for (const Direction direction : kDirections) fitting += check_plans(card, dtype, direction);
  for (const auto& [H, B] : {std::pair<int, int>{400, 64}, {1152, 64}, {1150, 70}, {1152, 256}, {768, 16}})
    for (const DType dtype : {DType::bf16, DType::f32}) check_fits(H, B, dtype, kCards[0]);
  check_fits(1152, 64, DType::f16, kCards[1]);  // an A100 holds it too
  std::printf("%d plans\n", fitting);
}
