"""Quality control of slides: measures of each one, and the flags that follow from them."""
