"""Turn maps into nuclei: instances, measurements, stitching of regions, and the table."""
