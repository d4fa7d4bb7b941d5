"""Train students, distilled or not, and HoVerNet teachers."""
