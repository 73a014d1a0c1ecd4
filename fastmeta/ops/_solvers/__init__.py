"""Solvers of ``(H + damping I) x = rhs`` for the last layer's Hessian; :func:`fastmeta.ops.solve_hessian` is the front.

``system`` is the linear operator, ``coordinates`` an orthonormal basis to solve it in, ``curvature`` and ``kronecker``
its structure, ``cholesky`` and ``conjugate_gradient`` the algorithms, ``cost`` their prices, ``driver`` puts them
together. On a GPU ``device`` takes the driver's place and ``device_conjugate_gradient`` the algorithm's, on the vector
``updates`` of Triton or PyTorch.

Symbols beside those of the operators: ``g_i = sqrt(|w_i|) [h_i, 1]`` is the row of an example in the system,
``K = D + 1`` (``D`` without a bias), ``C_i = d2l_i/df2 [C, C]``, so that ``H = sum_i sign(w_i) C_i (x) g_i g_i^T``.
"""
