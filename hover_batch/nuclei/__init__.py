"""Turn maps into nuclei: instances, measurements, stitching of regions, the table."""
