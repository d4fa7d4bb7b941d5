"""Knowledge distillation: train students and teachers as model packages, which `hover_batch` runs."""

import hover_batch  # noqa: F401  # sets environment variables, which must be done before numba is imported
