"""Solvers of ``(H + damping I) x = rhs`` for the last layer's Hessian; :func:`fastmeta.ops.solve_hessian` is the front.

``system`` is the linear operator, ``conjugate_gradient`` and ``cholesky`` the algorithms, ``kronecker`` the
preconditioner, ``few_rows`` the system in N C unknowns, ``solve`` chooses and checks.

Symbols beside those of the operators: ``g_i = sqrt(|w_i|) [h_i, 1]`` is the row of an example in the system,
``K = D + 1`` (``D`` without a bias), ``C_i = d2l_i/df2 [C, C]``, so that ``H = sum_i sign(w_i) C_i (x) g_i g_i^T``.
"""
