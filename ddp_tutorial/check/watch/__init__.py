"""In the ranks: what each of them does, written down, a line of JSON for each event. What it means is judged later."""
