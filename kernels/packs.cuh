// Rows as packs of 16 bytes, of any of three types. A row may start anywhere: who has which element does not depend on
// where, so sums are the same.
#pragma once
#include "device.cuh"

DEVICE float to_float(float x) { return x; }
DEVICE void from_float(float& y, float x) { y = x; }

template <typename T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};
template <typename T>
DEVICE Pack<T> load_pack(const T* row, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T>*>(row);
  Pack<T> pack;
  for (int e = 0; e < Pack<T>::SIZE; e++) pack.at[e] = row[e];
  return pack;
}
template <typename T>
DEVICE void store_pack(T* row, const Pack<T>& pack, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Pack<T>*>(row) = pack;
    return;
  }
  for (int e = 0; e < Pack<T>::SIZE; e++) row[e] = pack.at[e];
}
