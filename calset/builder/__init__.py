"""Problems -> traces -> verdicts: what fills the catalog."""
