"""Training of students, distilled or not, and of HoVerNet teachers."""
