"""Check the quality of slides: measures of each slide, and the flags that follow from them."""
