// What a Grafana server would have told the page: Grafana's packages read it as soon as they are loaded.
const theme = new URLSearchParams(location.search).get('theme') || 'light';

window.__grafana_public_path__ = 'public/';
window.grafanaBootData = {
  user: { theme, lightTheme: theme === 'light', timezone: 'utc', locale: 'en-US', regionalFormat: 'en-US', orgRole: 'Viewer' },
  settings: { featureToggles: {}, buildInfo: { version: '12.4.10', env: 'production', commit: '' } },
  navTree: [],
};
