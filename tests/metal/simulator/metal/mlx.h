// What MLX declares before every kernel, as far as kernels outside MLX use it. Metal text: the type check
// reads this file, too.

template <typename T, typename U>
inline T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}

// Where element `index` of a row-contiguous array lies in one of these strides.
template <typename Index = int64_t>
inline Index elem_to_loc(Index index, constant const int* shape, constant const int64_t* strides, int ndim) {
  Index location = 0;
  for (int axis = ndim - 1; axis >= 0 && index > 0; --axis) {
    location += (index % shape[axis]) * Index(strides[axis]);
    index /= shape[axis];
  }
  return location;
}

template <typename T>
struct Limits {
  static constexpr T max =
      metal::is_floating_point_v<T> ? metal::numeric_limits<T>::infinity() : metal::numeric_limits<T>::max();
  static constexpr T min = metal::is_floating_point_v<T> ? T(-metal::numeric_limits<T>::infinity())
                                                         : metal::numeric_limits<T>::lowest();
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::lowest();
};
