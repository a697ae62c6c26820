// How the four blocks of a group hand each other their sums on the way back (lstm_plan.h): through L2, or, as
// a cluster, through the shared memory of the block that made them.
//
// Both have one buffer for each row block. That is enough: a block overwrites its sums of a row block after
// it has multiplied the dgates of the next step, all of them, and so has seen every block publish these;
// whoever reads the sums computes those dgates from them, and publishes them after that. This holds for each
// row block by itself, however many a step has.
#pragma once
#include "lstm_persistent.h"

namespace ulmfit_fast::cuda {

// `count` is how many row blocks the launch has finished by then, of all steps.
template <class B>
struct SumsInL2 {
  static constexpr bool kCompiled = true;
  using Sums = Pack<float, 4>;
  const B& block;
  Sums* sums;   // of the part: (ctas, passes, B::kSums)
  Flag* flags;  // of the part: how many row blocks of sums each block has published
  int group;    // its first block

  __device__ SumsInL2(const LstmPersistentBackward& a, const B& block)
      : block(block), group(block.cta - block.cta % kGroup) {
    const LstmSplit& split = block.split;
    const int first = block.part * split.ctas;
    sums = reinterpret_cast<Sums*>(a.sums) + static_cast<int64_t>(first) * split.passes * B::kSums;
    flags = a.steps.flags + split.parts * split.ctas + first;
  }
  __device__ Sums* of(int cta, int pass) const {
    return sums + static_cast<int64_t>(cta * block.split.passes + pass) * B::kSums;
  }
  __device__ Sums* own(int pass) const { return of(block.cta, pass); }
  // Half a fragment of the sum that block `rank` of the group made.
  __device__ Pack<float, 2> load(int rank, int pass, int fragment, int pair) const {
    return load_shared_by_card(
        reinterpret_cast<const Pack<float, 2>*>(of(group + rank, pass)[fragment].v + 2 * pair));
  }
  // After the block's threads have written own(pass), and met at a barrier of the block.
  __device__ void publish_own(int, unsigned count) const {
    if (threadIdx.x == kPublisher) publish(flags + block.cta, count);
  }
  __device__ void wait(int, unsigned count) const { wait_for_flags(flags, group, group + kGroup, count); }
  __device__ void leave() const {}
};

// One barrier of the cluster for each step: a block arrives when it has left the sums of all row blocks, and
// waits before it reads the first; in between it fetches what its cells take.
template <class B>
struct SumsInCluster {
  static constexpr bool kCompiled = kClustersCompiled;
  const B& block;

  __device__ SumsInCluster(const LstmPersistentBackward&, const B& block) : block(block) {}
  __device__ Pack<float, 4>* own(int pass) const { return block.group_sums + pass * B::kSums; }
  __device__ Pack<float, 2> load(int rank, int pass, int fragment, int pair) const {
    return load_from_cluster(reinterpret_cast<const Pack<float, 2>*>(own(pass)[fragment].v + 2 * pair), rank);
  }
  __device__ void publish_own(int pass, unsigned) const {
    if (pass == block.split.passes - 1) arrive_at_cluster();
  }
  __device__ void wait(int pass, unsigned) const {
    if (pass == 0) wait_for_cluster();
  }
  // The shared memory of a block that has ended is not there any more: nobody ends before all have read.
  __device__ void leave() const {
    arrive_at_cluster();
    wait_for_cluster();
  }
};

}  // namespace ulmfit_fast::cuda
