"""Knowledge distillation: trains the student that `hover_batch` runs. What it gives back is a model package."""

import hover_batch  # noqa: F401  # completes the environment before a module of kd imports numba
