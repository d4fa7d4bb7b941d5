"""Data set of a whole cohort: the nuclei of many slides, runs and models in one partitioned GeoParquet data set."""
