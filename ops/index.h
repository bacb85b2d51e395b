#pragma once
#include "core/tensor.h"

namespace weft {

/// Rows of a table by number: the first layer of a language model.
///
///   y[..., c] = table[ids[...], c]
///
/// @param ids    any shape, i64 or i32, each in [0, V)
/// @param table  [V, C], any float dtype
/// @return       [..., C], dtype of the table
/// @throws Error  kIndex naming the first id outside the table and its place; kShape if the table has no two dimensions
///                or the result more than six; kDType if ids are no i64 or i32 or the table no float.
/// Saved for backward: ids. The gradient of a row is the sum over its ids in their order, in f32 (f64 for f64), rounded
/// once: ids are sorted first, and the bits do not depend on the number of threads. It is written where a leaf keeps
/// its gradient: with one there already, rows that no id names are not touched.
Tensor embedding(const Tensor& ids, const Tensor& table);

/// The same for a part of a table of `all` rows: `table` has those from number `first` on.
///
///   y[..., c] = table[ids[...] - first, c] if the part has that row, else 0
///
/// So the results for the parts of a table add up to that for all of it. Each id is in [0, all).
/// @throws Error  also kShape if the part is not within `all` rows.
Tensor embedding(const Tensor& ids, const Tensor& table, int64_t first, int64_t all);

/// Elements of x by an index along one dimension. For three dimensions and dim = 1:
///
///   y[i, j, k] = x[i, index[i, j, k], k]
///
/// @param x      any dtype
/// @param dim    negative counts from the end
/// @param index  i64 or i32, the rank of x; sizes at most those of x except along dim; each in [0, x.size(dim))
/// @return       shape of index, dtype of x
/// @throws Error  kIndex naming the first index outside x and its place; kShape, kDType, as above.
/// Differentiable in x. Saved for backward: index. Elements taken several times get the sum of their gradients in
/// row-major order, in f32 (f64 for f64), rounded once.
Tensor gather(const Tensor& x, int64_t dim, const Tensor& index);

}  // namespace weft
