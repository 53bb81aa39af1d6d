"""What a page needs: set-up, source, difference, figures, timing. No script imports it."""
