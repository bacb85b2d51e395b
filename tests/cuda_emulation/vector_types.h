#pragma once
// CUDA's small vectors, with the alignment the device's wide loads ask for.

#define WEFT_VECTORS(T, Name, align2, align4)                           \
  struct alignas(align2) Name##2 { T x, y; };                           \
  struct Name##3 { T x, y, z; };                                        \
  struct alignas(align4) Name##4 { T x, y, z, w; };                     \
  constexpr Name##2 make_##Name##2(T x, T y) { return {x, y}; }         \
  constexpr Name##3 make_##Name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr Name##4 make_##Name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
WEFT_VECTORS(float, float, 8, 16)
WEFT_VECTORS(int, int, 8, 16)
WEFT_VECTORS(unsigned int, uint, 8, 16)
WEFT_VECTORS(unsigned short, ushort, 4, 8)
#undef WEFT_VECTORS

struct alignas(16) double2 {
  double x, y;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
struct alignas(16) longlong2 {
  long long x, y;
};
constexpr longlong2 make_longlong2(long long x, long long y) { return {x, y}; }

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int width = 1, unsigned int height = 1, unsigned int depth = 1)
      : x(width), y(height), z(depth) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
