"""From maps to nuclei: regions, instances, measures, stitching, the table."""
