"""What `olmoe bench` measures, over the real runner."""
