"""The page that `demo.py` opens in the browser: what it shows, and what is done when somebody clicks."""
