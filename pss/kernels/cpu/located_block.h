// Where the ids of a few rows of the batch read M: the hash, a block of ids ahead of its use.
//
// Ids are taken in the order of the output (row, feature, place in the bag) and hashed together, so that the arithmetic
// is vector arithmetic whatever the features and lengths; plain loops, which compilers turn into it for any machine. The
// same order as in the batch, feature by feature, saves the transposition and was slower: locations are then read from a
// hundred places in turn.
#pragma once

#include <algorithm>

#include "lookup.h"

namespace pss {

constexpr u32 kSign = 1u << 31;  // of a location: its chunk is subtracted

inline u64 mix64(u64 x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}

class LocatedBlock {
 public:
  i64 first_row = 0, last_row = 0, size = 0;  // rows of the batch; ids of these rows
  std::vector<float> weight;                  // of every id, over the bag's length for mean pooling; if scaled
  std::vector<u32> bag_start;                 // ids of the q-th bag of these rows: [bag_start[q], bag_start[q + 1])

  // Rows for a block whose locations stay in the L1 cache.
  static i64 rows_per_block(const Lookup& lookup) {
    const i64 wanted = std::clamp<i64>(kLocations / lookup.plan.chunks, kFewestIds, kMostIds);
    return std::max<i64>(1, wanted * lookup.rows / std::max<i64>(1, lookup.visited_ids));
  }

  // Location of chunk j of every id, with kSign. After the last come kAhead zeros: a place to prefetch from.
  const u32* chunk(i64 j) const { return locations_.data() + j * stride_; }
  i64 stride() const { return stride_; }  // from chunk j to j + 1
  static constexpr i64 kAhead = 64;

  void locate(const Lookup& lookup, i64 from_row, i64 to_row) {
    first_row = from_row, last_row = to_row;
    size = count_ids(lookup);
    stride_ = (size + 15) / 16 * 16 + kAhead;
    reserve(lookup.plan);
    if (lookup.ids.scalar_type() == at::kLong) gather(lookup, lookup.ids.const_data_ptr<i64>());
    else gather(lookup, lookup.ids.const_data_ptr<int32_t>());
    hash(lookup.plan);
  }

 private:
  static constexpr i64 kLocations = 4096, kFewestIds = 64, kMostIds = 1024;
  static constexpr u64 kPrime = 2038074743;

  i64 stride_ = 0;
  std::vector<u32> locations_;
  std::vector<u64> id_, word_, table_key_, sign_key_;
  std::vector<u64> slots_, start_, step_;  // if the plan has starts: location = hash in [0, slots) + start + j · step
  i64 keys_filled_ = 0;

  i64 count_ids(const Lookup& lookup) const {
    if (lookup.has_one_id_per_bag) return (last_row - first_row) * lookup.plan.features;
    i64 ids = 0;
    for (i64 feature : lookup.features) {
      const i64* offset = lookup.offset + feature * lookup.rows;
      ids += offset[last_row] - offset[first_row];
    }
    return ids;
  }

  void reserve(const Plan& plan) {
    if (i64(locations_.size()) < stride_ * plan.chunks) locations_.resize(stride_ * plan.chunks);
    for (i64 j = 0; j < plan.chunks; j++) std::fill_n(locations_.data() + j * stride_ + size, stride_ - size, 0u);
    if (i64(id_.size()) >= size) return;
    id_.resize(size), word_.resize(size), table_key_.resize(size), weight.resize(size), keys_filled_ = 0;
    if (plan.is_signed) sign_key_.resize(size);
    if (plan.has_starts()) slots_.resize(size), start_.resize(size), step_.resize(size);
  }

  template <class Id>
  void gather(const Lookup& lookup, const Id* ids) {
    const Plan& plan = lookup.plan;
    const i64 bags = (last_row - first_row) * plan.features;
    if (i64(bag_start.size()) < bags + 1) bag_start.resize(bags + 1);
    if (lookup.has_one_id_per_bag) gather_single(lookup, ids);
    else gather_jagged(lookup, ids);
    if (plan.has_starts()) {
      i64 x = 0;
      for (i64 q = 0; q < bags; q++)
        for (; x < bag_start[q + 1]; x++) find_start(plan, q % plan.features, x);
    }
    if (plan.is_flattened)
      for (i64 x = 0; x < size; x++) id_[x] *= plan.chunks;  // of the flattened table: its first block
  }

  // One id a bag: a transposition of ids; keys repeat with the features and are there from the block before.
  template <class Id>
  void gather_single(const Lookup& lookup, const Id* ids) {
    const Plan& plan = lookup.plan;
    const i64 features = plan.features, rows = last_row - first_row;
    for (i64 f = 0; f < features; f++) {
      const i64 first = lookup.offset[lookup.features[f] * lookup.rows] + first_row;
      const Id* from = ids + first;
      u64* to = id_.data() + f;
      i64 row = 0;
      for (; row + 8 <= rows; row += 8, to += 8 * features) {
#pragma GCC unroll 8
        for (i64 r = 0; r < 8; r++) to[r * features] = u64(i64(from[row + r]));
        __builtin_prefetch(from + rows + row);  // the next block's: too many short runs for the machine to foresee
      }
      for (; row < rows; row++, to += features) *to = u64(i64(from[row]));
      if (lookup.is_scaled)
        for (i64 row = 0, x = f; row < rows; row++, x += features) weight[x] = lookup.weight ? lookup.weight[first + row] : 1.f;
    }
    for (i64 x = keys_filled_; x < size; x++) fill_keys(plan, x % plan.features, x), bag_start[x] = u32(x);
    keys_filled_ = std::max(keys_filled_, size), bag_start[size] = u32(size);
  }

  template <class Id>
  void gather_jagged(const Lookup& lookup, const Id* ids) {
    const Plan& plan = lookup.plan;
    i64 x = 0, q = 0;
    bag_start[0] = 0;
    for (i64 row = first_row; row < last_row; row++) {
      for (i64 f = 0; f < plan.features; f++) {
        const i64* bag = lookup.offset + lookup.features[f] * lookup.rows + row;
        const float share = plan.is_mean && bag[1] > bag[0] ? 1.f / float(bag[1] - bag[0]) : 1.f;
        for (i64 place = bag[0]; place < bag[1]; place++, x++) {
          id_[x] = u64(i64(ids[place]));
          fill_keys(plan, f, x);
          if (lookup.is_scaled) weight[x] = (lookup.weight ? lookup.weight[place] : 1.f) * share;
        }
        bag_start[++q] = u32(x);
      }
    }
  }

  void fill_keys(const Plan& plan, i64 feature, i64 x) {
    table_key_[x] = plan.location.table_keys[feature];
    if (plan.is_signed) sign_key_[x] = plan.sign.table_keys[feature];
  }

  // Of a row within its block, or the part of M where an id belongs (pss.methods.robe, `_divided`). A private row is one run,
  // its hash range empty.
  void find_start(const Plan& plan, i64 feature, i64 x) {
    const i64 id = i64(id_[x]);
    if (plan.rows_per_block > 1) {
      const i64 rest = id % plan.rows_per_block, row = rest < 0 ? rest + plan.rows_per_block : rest;
      slots_[x] = plan.slots[0], start_[x] = row * plan.embedding_dim, step_[x] = 0;
      id_[x] = u64((id - row) / plan.rows_per_block);
      return;
    }
    i64 tier = 0;
    while (tier + 1 < plan.tiers && id >= plan.bounds[tier * plan.features + feature]) tier++;
    slots_[x] = plan.slots[tier], start_[x] = plan.starts[tier], step_[x] = 0;
    if (plan.has_private_rows && id >= 1 && id < plan.private_bounds[feature])
      slots_[x] = 0, start_[x] = plan.private_starts[feature] + id * plan.embedding_dim, step_[x] = plan.block_size;
  }

  void hash(const Plan& plan) {
    if (plan.location.multiplier) hash_affine(plan);
    else hash_independent(plan);
    if (plan.is_signed && plan.sign.multiplier) sign_affine(plan);
    else if (plan.is_signed) sign_independent(plan);
  }

  void mix(const std::vector<u64>& key, i64 chunk) {
    const i64 count = size;  // and pointers of our own: what is stored could be any of the members
    const u64 *id = id_.data(), *table_key = key.data();
    u64* word = word_.data();
    for (i64 x = 0; x < count; x++) word[x] = mix64(id[x] + u64(chunk) + table_key[x]);
  }

  void hash_independent(const Plan& plan) {
    const auto& keys = plan.location.chunk_keys;
    const u64 slots = plan.slots[0];
    for (i64 j = 0; j < plan.chunks; j++) {
      if (j == 0 || plan.is_flattened) mix(table_key_, plan.is_flattened ? j : 0);
      const u64 key = keys[plan.is_flattened ? 0 : j];
      u32* location = locations_.data() + j * stride_;
      const u64* word = word_.data();
      const i64 count = size;
      if (plan.has_starts())
        for (i64 x = 0; x < count; x++)
          location[x] = u32(((word[x] * key >> 32) * slots_[x] >> 32) + start_[x] + u64(j) * step_[x]);
      else
        for (i64 x = 0; x < count; x++) location[x] = u32((word[x] * key >> 32) * slots >> 32);
    }
  }

  // (block · multiplier + key) mod P in word_; any int64 is a block, as in Python.
  void reduce(const std::vector<u64>& key, u64 multiplier, i64 chunk) {
    for (i64 x = 0; x < size; x++) {
      const i64 remainder = i64(id_[x] + u64(chunk)) % i64(kPrime);
      word_[x] = (u64(remainder < 0 ? remainder + i64(kPrime) : remainder) * multiplier + key[x]) % kPrime;
    }
  }

  void hash_affine(const Plan& plan) {
    for (i64 j = 0; j < plan.chunks; j++) {
      if (j == 0 || plan.is_flattened) reduce(table_key_, plan.location.multiplier, plan.is_flattened ? j : 0);
      const u64 key = plan.location.chunk_keys[plan.is_flattened ? 0 : j];
      u32* location = locations_.data() + j * stride_;
      for (i64 x = 0; x < size; x++) {
        const bool has_starts = plan.has_starts();
        const u32 slots = u32(has_starts ? slots_[x] : plan.slots[0]);
        const u32 sum = u32(word_[x] + key), value = sum >= kPrime ? sum - u32(kPrime) : sum;
        location[x] = (slots ? value % slots : 0) + (has_starts ? u32(start_[x] + j * step_[x]) : 0);
      }
    }
  }

  void sign_independent(const Plan& plan) {
    for (i64 j = 0; j < plan.chunks; j++) {
      if (j == 0 || plan.is_flattened) mix(sign_key_, plan.is_flattened ? j : 0);
      const u64 key = plan.sign.chunk_keys[plan.is_flattened ? 0 : j];
      u32* location = locations_.data() + j * stride_;
      for (i64 x = 0; x < size; x++) location[x] |= u32(word_[x] * key >> 32) & kSign;
    }
  }

  void sign_affine(const Plan& plan) {
    for (i64 j = 0; j < plan.chunks; j++) {
      if (j == 0 || plan.is_flattened) reduce(sign_key_, plan.sign.multiplier, plan.is_flattened ? j : 0);
      const u64 key = plan.sign.chunk_keys[plan.is_flattened ? 0 : j];
      u32* location = locations_.data() + j * stride_;
      for (i64 x = 0; x < size; x++) location[x] |= u32((word_[x] + key) % kPrime % 2) << 31;
    }
  }
};

}  // namespace pss
