// What the blocks of a part of the persistent recurrence do to memory and in which order, as vector clocks of
// their warps: finds deadlocks, reads of what is not surely written, and writes over what may still be read.
#pragma once
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "kernels/cuda/lstm_plan.h"

namespace ulmfit_fast::cuda {

// What is left out or misplaced, to see that the model notices.
enum class Mistake {
  none,
  products_unordered,
  sums_unawaited,
  sums_awaited_early,
  arrival_too_early,
  no_last_barrier
};

// Waits for flags, and the barriers of clusters, are all that orders two blocks. The order that follows holds
// in every run, so one run decides about all.
class LstmModel {
 public:
  LstmModel(const LstmSplit& s, int T, Mistake mistake = Mistake::none) : s(s), T(T), mistake(mistake) {
    const int warps = s.ctas * kSplitWarps;
    clock.assign(warps, std::vector<int>(warps));
    at.assign(s.ctas, 0);
    program();
  }

  // Runs every block as far as it can, again and again; a wait that nobody ends is a deadlock. What is wrong,
  // or nothing.
  std::string run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int cta = s.ctas - 1; cta >= 0; --cta)
        while (at[cta] < static_cast<int>(steps[cta].size()) && take(cta, steps[cta][at[cta]]))
          ++at[cta], moved = true;
    }
    for (int cta = 0; cta < s.ctas; ++cta)
      expect(at[cta] == static_cast<int>(steps[cta].size()), cta, "waits for ever at step", "", at[cta]);
    return fault;
  }

 private:
  enum Kind { wait, sync, read, write, publish, arrive, await };
  struct Step {
    Kind kind;
    int warp;          // warp 0 stands for the block in what all do between two barriers of the block
    std::string what;  // a flag or a piece of a buffer, without its owner
    int first, end;    // blocks whose piece or flag it is
    int value;         // of the flag, which version of the piece, or which barrier of the cluster
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
  void add_arrival(int cta, int barrier) { add(cta, {arrive, 0, "", 0, 0, barrier}); }
  void add_await(int cta, int barrier) {
    for (int w = 0; w < kSplitWarps; ++w) add(cta, {await, w, "", 0, 0, barrier});
  }

  // The kernels' order of waits, reads, barriers, writes and flags (lstm_persistent*.cu, lstm_sums.h).
  void program() {
    steps.resize(s.ctas);
    for (int cta = 0; cta < s.ctas; ++cta) s.direction == Direction::forward ? forward(cta) : backward(cta);
  }
  std::string buffer(const char* name, int number, int pass) const {
    return name + std::to_string(number) + "/" + std::to_string(pass);
  }
  // Block::multiply, and that its sums are read; `count` numbers these too.
  void read_sources(int cta, const char* flags, const std::string& what, int count, int version) {
    const auto product = [&](Kind kind, int warp, int of_warp, int done) {
      add(cta, {kind, warp, "product" + std::to_string(of_warp % kSumWarps), cta, cta + 1, 2 * count + done});
    };
    for (int w = 0; w < kSplitWarps; ++w) {
      add(cta, {wait, w, flags, s.first_source(w), s.end_source(w), count});
      add(cta, {read, w, what, s.first_source(w), s.end_source(w), version});
    }
    for (int w = kSumWarps; w < kSplitWarps; ++w) product(write, w, w, 0);
    if (mistake != Mistake::products_unordered) add_sync(cta);
    for (int w = 0; w < kSumWarps; ++w) product(read, w, w, 0), product(write, w, w, 1);
    add_sync(cta);
    for (int w = 0; w < kSumWarps; ++w) product(read, 0, w, 1);
  }
  void write_and_publish(int cta, const std::string& what, int version, const char* flags, int count) {
    add(cta, {write, 0, what, cta, cta + 1, version});
    add_sync(cta);
    add(cta, {publish, kPublisher / 32, flags, cta, cta + 1, count});
  }
  void forward(int cta) {
    for (int pass = 0; pass < s.passes; ++pass) add(cta, {write, 0, buffer("h", 0, pass), cta, cta + 1, 0});
    add_sync(cta);
    add(cta, {publish, kPublisher / 32, "h", cta, cta + 1, s.passes});
    for (int i = 0; i < T; ++i)
      for (int pass = 0; pass < s.passes; ++pass) {
        const int published = i * s.passes + pass + 1;
        read_sources(cta, "h", buffer("h", i % 2, pass), published, i);
        write_and_publish(cta, buffer("h", (i + 1) % 2, pass), i + 1, "h", published + s.passes);
      }
  }
  // The sums that the group left in the n'th step, `version` of them.
  void read_sums(int cta, int n, int pass, int version) {
    const int group = cta / kGroup * kGroup;
    const bool early = mistake == Mistake::sums_awaited_early && pass > 0;
    if (mistake != Mistake::sums_unawaited && s.clusters && pass == 0) add_await(cta, n);
    for (int w = 0; w < kSplitWarps; ++w) {
      if (mistake != Mistake::sums_unawaited && !s.clusters)
        add(cta, {wait, w, "sums", group, group + kGroup, (n - 1) * s.passes + pass + (early ? 0 : 1)});
      if (cta * s.cta_units() < padded_units(s.H))
        add(cta, {read, w, buffer("sums", 0, pass), group, group + kGroup, version});
    }
  }
  void leave_sums(int cta, int n, int pass, int version) {
    const bool last = pass == s.passes - 1;
    if (!s.clusters)
      return write_and_publish(cta, buffer("sums", 0, pass), version, "sums", (n - 1) * s.passes + pass + 1);
    if (last && mistake == Mistake::arrival_too_early) add_arrival(cta, n);
    add(cta, {write, 0, buffer("sums", 0, pass), cta, cta + 1, version});
    add_sync(cta);
    if (last && mistake != Mistake::arrival_too_early) add_arrival(cta, n);
  }
  void backward(int cta) {
    for (int i = T - 1; i >= 0; --i) {
      const int n = T - i, done = (n - 1) * s.passes;
      for (int pass = 0; pass < s.passes; ++pass) {
        if (i < T - 1) read_sums(cta, n - 1, pass, i + 1);
        write_and_publish(cta, buffer("dgates", i % 2, pass), i, "dgates", done + pass + 1);
      }
      for (int pass = 0; pass < s.passes; ++pass) {
        read_sources(cta, "dgates", buffer("dgates", i % 2, pass), done + pass + 1, i);
        leave_sums(cta, n, pass, i);
      }
    }
    for (int pass = 0; pass < s.passes; ++pass) read_sums(cta, T, pass, 0);
    if (!s.clusters) return;
    if (mistake != Mistake::no_last_barrier) add_arrival(cta, T + 1), add_await(cta, T + 1);
    add_sync(cta);  // a block ends with the last of its warps, and with it its shared memory
    for (int pass = 0; pass < s.passes; ++pass)
      add(cta, {write, 0, buffer("sums", 0, pass), cta, cta + 1, -1});
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
    const std::pair<int, int> barrier{cta / kGroup, step.value};
    if (step.kind == arrive) {
      for (int w = 0; w < kSplitWarps; ++w) ++clock[id(cta, w)][id(cta, w)];
      auto& [arrived, all] = barriers[barrier];
      ++arrived, all.resize(clock.size());
      for (int w = 0; w < kSplitWarps; ++w) join(all, clock[id(cta, w)]);
      return true;
    }
    if (step.kind == await) {
      const auto& [arrived, all] = barriers[barrier];
      if (arrived == kGroup) join(clock[me], all);
      return arrived == kGroup;
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
        expect(piece.version == step.value, cta, "reads another version of", key, step.value);
        for (size_t i = 0; i < piece.writer.size(); ++i)
          expect(piece.writer[i] <= clock[me][i], cta, "reads before it is surely written", key, step.value);
        piece.readers.push_back({me, clock[me][me]});
      } else {
        for (const auto& [reader, time] : piece.readers)
          expect(time <= clock[me][reader], cta, "overwrites what may still be read,", key, step.value);
        piece.version = step.value, piece.writer = clock[me], piece.readers.clear();
      }
    }
    return true;
  }

  void expect(bool holds, int cta, const char* does, const std::string& what, int value) {
    if (!holds && fault.empty())
      fault = "block " + std::to_string(cta) + " " + does + " " + what + " " + std::to_string(value);
  }

  const LstmSplit& s;
  int T;
  Mistake mistake;
  std::string fault;                     // the first
  std::vector<std::vector<Step>> steps;  // of each block
  std::vector<int> at;
  std::vector<Clock> clock;  // of each warp
  std::map<std::string, std::pair<int, int>> flags;
  std::map<std::string, std::map<int, Clock>> history;  // of a flag: what each value says
  std::map<std::string, Piece> pieces;
  std::map<std::pair<int, int>, std::pair<int, Clock>> barriers;  // of a cluster: arrived, what they know
};

}  // namespace ulmfit_fast::cuda
