"""Knowledge distillation: trains the student that `hover_batch` runs. What it gives back is a model package."""
